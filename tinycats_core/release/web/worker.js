// Draws and judges in a worker, so that the page never freezes. `noise.js` stands above this text.
// Questions: {id, start: …} once, then {id, draw: …}; each is answered by {id, …}, or {id, failed} with the reason.
"use strict";

let ort, generator, judge, about;
let before = Promise.resolve(); // a session of the runtime answers one question at a time

self.onmessage = ({ data }) => {
  before = before.then(() => answer(data));
};

async function answer({ id, start: starting, draw: drawing }) {
  try {
    self.postMessage({ id, ...(starting ? await start(starting) : await draw(drawing)) });
  } catch (error) {
    self.postMessage({ id, failed: String(error?.message ?? error).split("\n")[0].slice(0, 300) });
  }
}

// Load the runtime and the two networks, each given as bytes. `script` may be an address instead.
async function start(given) {
  const { script, wasm, graph, classifier, threads } = given;
  about = given.about;
  const address = typeof script === "string" ? script : URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  ort = await import(address);
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "extended" };
  generator = await ort.InferenceSession.create(new Uint8Array(graph), options);
  judge = classifier ? await ort.InferenceSession.create(new Uint8Array(classifier), options) : null;
  return { threads: ort.env.wasm.numThreads };
}

// Draw one cat: its pixels, uint8 planes of red, green and blue, and which class the judge sees with which probability.
async function draw({ label, index, seed, guidance }) {
  const size = about.image_size, begun = performance.now();
  const { images } = await generator.run({
    noise: new ort.Tensor("float32", noise(seed, index, size), [1, 3, size, size]),
    labels: new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
    guidance: new ort.Tensor("float32", Float32Array.of(guidance), []),
  });
  const milliseconds = performance.now() - begun, pixels = images.data;
  return { pixels, milliseconds, seen: judge && (await judged(pixels, size)) };
}

async function judged(pixels, size) {
  const { logits } = await judge.run({ images: new ort.Tensor("uint8", pixels, [1, 3, size, size]) });
  const top = Math.max(...logits.data), weights = Array.from(logits.data, (logit) => Math.exp(logit - top));
  return { label: logits.data.indexOf(top), probability: 1 / weights.reduce((sum, weight) => sum + weight, 0) };
}
