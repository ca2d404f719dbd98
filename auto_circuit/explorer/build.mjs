// Bundles src/ into built/explorer.js, which Python puts into pages and notebooks.
// The banner has a digest of the sources: a test compares it with theirs.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import * as esbuild from "esbuild";

const names = [...readdirSync("src").map((name) => `src/${name}`), "package-lock.json"];
const digest = createHash("sha256");
for (const name of names.sort()) {
  digest.update(`${name}\0`).update(readFileSync(name)).update("\0");
}
const licence = readFileSync("node_modules/cytoscape/LICENSE", "utf8")
  .trim()
  .replace(/[\u201c\u201d]/g, '"');
const version = JSON.parse(readFileSync("node_modules/cytoscape/package.json")).version;
const banner = [
  "/*! AutoCircuit's circuit explorer. Built from auto_circuit/explorer/src, do not edit.",
  `sources: ${digest.digest("hex")}`,
  `Contains cytoscape.js ${version}:`,
  licence,
  "*/",
].join("\n");

const result = await esbuild.build({
  entryPoints: ["src/index.js"],
  bundle: true,
  minify: true,
  write: false,
  format: "esm",
  target: "es2020",
  charset: "ascii",
  legalComments: "none",
  loader: { ".css": "text" },
});
const code = result.outputFiles[0].text;
for (const end of ["</script", "<!--"]) {
  if (code.toLowerCase().includes(end)) throw new Error(`The code contains ${end}.`);
}
writeFileSync("built/explorer.js", `${banner}\n${code}`);
