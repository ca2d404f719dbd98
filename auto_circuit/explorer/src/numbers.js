// Numbers: typed arrays out of base64, and numbers as text.

const TYPES = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  float32: Float32Array,
};

/** The typed array that Python's `as_data` gave. */
export function arrayOf(packed) {
  if (packed === null) return null;
  const text = atob(packed.base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new TYPES[packed.dtype](bytes.buffer);
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
