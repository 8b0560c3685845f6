// Enter sends; with Shift, or while an input method is composing a word, it is a letter.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// A question that was not sent outlives a reload.
const question = () => document.querySelector(".box textarea");
addEventListener("pagehide", () => sessionStorage.setItem("draft", question()?.value ?? ""));
const restoreDraft = () => {
  const draft = sessionStorage.getItem("draft");
  if (!draft || question().value) return;
  question().value = draft;
  question().dispatchEvent(new Event("input"));
};

const BACKDROP = ".q-drawer__backdrop:not(.hidden)"; // a side lies over the page

// Escape stops the answer, unless it closes something.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector(".q-dialog, .q-menu"))
    document.querySelector(`${BACKDROP}, .stop:not(.hidden)`)?.click();
});

// On a phone the list lies over what it opens.
document.addEventListener("click", (event) => {
  if (event.target.closest(".entry-title, .new"))
    document.querySelector(BACKDROP)?.click();
});
