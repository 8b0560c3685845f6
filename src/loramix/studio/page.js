// Enter sends; with Shift, or while an input method is composing a word, it is a letter.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// Escape stops the answer, unless it closes something.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector(".q-dialog, .q-menu"))
    document.querySelector(".stop:not(.hidden)")?.click();
});

// On a phone the list lies over what it opens.
document.addEventListener("click", (event) => {
  if (event.target.closest(".entry-title, .new"))
    document.querySelector(".q-drawer__backdrop:not(.hidden)")?.click();
});
