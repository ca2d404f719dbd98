// Tasks out of the text that Python's `packed` made of them; see there for its form.

import { unzipped } from "./unzipped.js";

/** {tasks: [a task's view, ...]}; each array has `bytes`, in which it begins `at`. */
export async function unpacked(text) {
  const all = await unzipped(text);
  const end = 4 + new DataView(all.buffer).getUint32(0, true);
  const bytes = all.subarray(end);
  return JSON.parse(new TextDecoder().decode(all.subarray(4, end)), (name, value) => {
    if (typeof value?.dtype !== "string") return value;
    return { ...value, length: value.shape.reduce((a, b) => a * b, 1), bytes };
  });
}
