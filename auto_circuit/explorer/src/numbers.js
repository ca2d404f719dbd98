// Numbers: typed arrays out of bytes, and numbers as text.

const TYPES = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  float32: Float32Array,
};

/** The typed array of what `packed.js` read: the first byte of each number, the second ... */
export function arrayOf(packed) {
  if (packed === null) return null;
  const numbers = new TYPES[packed.dtype](packed.length);
  const bytes = new Uint8Array(numbers.buffer);
  const size = numbers.BYTES_PER_ELEMENT;
  for (let i = 0; i < packed.length; i += 1) {
    for (let byte = 0; byte < size; byte += 1) {
      bytes[i * size + byte] = packed.bytes[packed.at + byte * packed.length + i];
    }
  }
  return numbers;
}

/** float32 numbers of which the upper 16 bits are given. */
export function upperHalves(halves) {
  if (halves === null) return null;
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i += 1) bits[i] = halves[i] * 65536;
  return new Float32Array(bits.buffer);
}

export function count(n) {
  return n.toLocaleString("en-US");
}

export function counted(n, what) {
  return `${count(n)} ${what}${n === 1 ? "" : "s"}`;
}

/** Three digits, with a sign. */
export function signed(x) {
  if (!Number.isFinite(x)) return x > 0 ? "+∞" : "−∞";
  if (x === 0) return "0";
  const text = digits(Math.abs(x));
  return x < 0 ? `−${text}` : `+${text}`;
}

export function digits(x) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return "∞";
  return x >= 1e5 || x < 1e-3 ? x.toExponential(2).replace("-", "−") : x.toPrecision(3);
}

export function plain(x) {
  return x < 0 ? `−${digits(-x)}` : digits(x);
}
