// A range as browsers have it: they know its keys, and tell its name and value to who cannot see it.
export default {
  template: `
    <input
      type="range"
      class="range"
      :max="max"
      :value="modelValue"
      :style="{ '--at': modelValue / max }"
      @input="$emit('update:modelValue', Number($event.target.value))"
    />`,
  props: { modelValue: Number, max: Number },
};
