// The page: reads what to draw from the form and the address, asks the worker for one cat after another, and shows them.
"use strict";

const LARGE = 16 * 2 ** 20; // bytes of a graph from which on several threads pay
const CELL = 128; // pixels of a cat on a saved picture, at least
const about = JSON.parse(document.getElementById("about").textContent);
const byId = (id) => document.getElementById(id);
const form = byId("form"), list = byId("cats"), status = byId("status"), progress = byId("progress");
const breedName = (label) => about.classes[label].replaceAll("_", " ");
const pending = new Map(); // questions to the worker that it has not answered, by number
let worker, questions = 0, drawing = 0, drawn = [];

// A problem that a person can do something about.
class Problem extends Error {}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

// Assets: embedded in the page, or fetched.

async function asset(name, report) {
  const { address, bytes, sha256 } = about.assets[name], embedded = byId(`asset-${name}`);
  const content = embedded ? await unpacked(embedded) : await fetched(address, bytes, report);
  // Pages that came over plain HTTP have no crypto.subtle.
  if (content.byteLength !== bytes || (crypto.subtle && (await digest(content)) !== sha256)) {
    throw new Problem(`${name} is damaged: its bytes are not those of this release. Reload the page, or download the release again.`);
  }
  return content;
}

async function unpacked(element) {
  const packed = await fetch(`data:application/octet-stream;base64,${element.textContent}`);
  element.remove();
  return new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function fetched(address, bytes, report) {
  const again = "Check the connection, and reload the page.";
  let response;
  try {
    response = await fetch(address);
  } catch {
    throw new Problem(`${address} cannot be loaded: the server does not answer. ${again}`);
  }
  if (!response.ok) throw new Problem(`${address} cannot be loaded: the server answers ${response.status}. Reload the page, or publish the release again.`);
  const content = new Uint8Array(bytes), reader = response.body.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => { throw new Problem(`${address} has stopped loading. ${again}`); });
    if (done) break;
    if (filled + value.length > bytes) return new ArrayBuffer(0); // longer than it should be: damaged
    content.set(value, filled);
    filled += value.length;
    report(value.length);
  }
  return content.buffer.slice(0, filled);
}

async function digest(content) {
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The worker.

function workerAddress() {
  const embedded = byId("worker");
  return embedded ? URL.createObjectURL(new Blob([embedded.textContent], { type: "text/javascript" })) : "worker.js";
}

function startWorker() {
  worker = new Worker(workerAddress());
  worker.onmessage = ({ data: { id, failed, ...answer } }) => {
    const { resolve, reject } = pending.get(id);
    pending.delete(id);
    failed === undefined ? resolve(answer) : reject(new Error(failed));
  };
  worker.onerror = (event) => {
    pending.forEach(({ reject }) => reject(new Error(event.message || "the script of the worker cannot be loaded")));
    pending.clear();
  };
}

function ask(kind, question, transfer = []) {
  return new Promise((resolve, reject) => {
    pending.set(++questions, { resolve, reject });
    worker.postMessage({ id: questions, [kind]: question }, transfer);
  });
}

async function start() {
  const embedded = Boolean(byId("asset-graph"));
  if (location.protocol === "file:" && !embedded) {
    throw new Problem("This page was opened from a file, and browsers do not let such a page read its network. Open cats.html instead, which lies beside the folder of this page, or run: tinycats demo RELEASE");
  }
  if (typeof WebAssembly !== "object" || typeof Worker !== "function" || typeof DecompressionStream !== "function") {
    throw new Problem("This browser cannot draw cats: it has no WebAssembly, or it is switched off. Use a current browser.");
  }
  const names = Object.keys(about.assets), total = names.reduce((sum, name) => sum + about.assets[name].bytes, 0);
  let loaded = 0;
  status.textContent = `Loading ${(total / 1e6).toFixed(0)} MB …`;
  const report = (bytes) => { progress.value = 0.9 * ((loaded += bytes) / total); };
  const contents = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await asset(name, report)])));
  status.textContent = "Getting ready …";
  startWorker();
  const many = self.crossOriginIsolated && !embedded && contents.graph.byteLength > LARGE;
  const script = many ? new URL(about.assets.script.address, location.href).href : contents.script;
  const { graph, wasm, classifier } = contents;
  const threads = many ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  await ask("start", { script, wasm, graph, classifier, threads, about }, [wasm, graph, ...(classifier ? [classifier] : [])]);
  progress.value = 1;
}

// What to draw.

const EVERY = "every breed";

function fillForm() {
  form.breed.replaceChildren();
  if (about.classes.length > 1) form.breed.add(new Option("Every breed", EVERY));
  about.classes.forEach((name, label) => form.breed.add(new Option(breedName(label), name)));
  const asked = new URLSearchParams(location.hash.slice(1)), refused = [];
  const given = { breed: form.breed.options[0].value, n: 1, seed: about.seed, guidance: about.guidance };
  for (const [name, field] of Object.entries({ breed: form.breed, n: form.n, seed: form.seed, guidance: form.guidance })) {
    field.value = asked.get(name) ?? given[name];
    if (field.value === "" || !field.checkValidity()) {
      refused.push(`${name}=${(asked.get(name) ?? "").slice(0, 40)}`);
      field.value = given[name];
    }
  }
  return refused.length ? `The link asks for ${refused.join(", ")}, which this page cannot draw; it draws its own choice instead. ` : "";
}

function wanted() {
  const { breed, n, seed, guidance } = Object.fromEntries(new FormData(form));
  const labels = breed === EVERY ? about.classes.map((_, label) => label) : [about.classes.indexOf(breed)];
  const cats = labels.flatMap((label) => Array.from({ length: Number(n) }, () => label));
  return { breed, n: Number(n), seed: Number(seed), guidance: Number(guidance), cats };
}

async function drawAll(before = "") {
  const mine = ++drawing, { cats, ...choice } = wanted();
  history.replaceState(null, "", `#${new URLSearchParams(choice)}`);
  list.replaceChildren(...cats.map(emptyCell));
  drawn = [];
  for (const id of ["save", "share"]) byId(id).disabled = true;
  byId("link").hidden = true;
  byId("stop").hidden = false;
  status.textContent = `${before}Drawing ${cats.length === 1 ? "a cat" : `${cats.length} cats`} …`;
  progress.value = 0;
  let milliseconds = 0;
  for (const [index, label] of cats.entries()) {
    const cat = await ask("draw", { label, index, seed: choice.seed, guidance: choice.guidance });
    if (mine !== drawing) return;
    milliseconds += cat.milliseconds;
    drawn.push({ label, ...cat });
    await show(list.children[index], label, cat);
    progress.value = (index + 1) / cats.length;
  }
  finish(milliseconds);
}

function finish(milliseconds) {
  const count = drawn.length, right = drawn.filter((cat) => cat.seen?.label === cat.label).length;
  const speed = count ? ` in ${(milliseconds / count).toFixed(0)} ms each` : "";
  const opinion = count && drawn[0].seen ? ` The judge recognises ${right} of ${count}.` : "";
  status.textContent = `${count} ${count === 1 ? "cat" : "cats"} drawn${speed}.${opinion}`;
  for (const id of ["save", "share"]) byId(id).disabled = count === 0;
  byId("stop").hidden = true;
}

// The pictures.

function emptyCell(label) {
  const cell = document.createElement("li"), image = document.createElement("img");
  image.alt = "";
  const name = document.createElement("span"), seen = document.createElement("span");
  [name.className, seen.className] = ["name", "seen quiet"];
  name.textContent = breedName(label);
  cell.append(image, name, seen);
  return cell;
}

function picture({ pixels }) {
  const size = about.image_size, area = size * size, data = new ImageData(size, size);
  for (let i = 0; i < area; i++) data.data.set([pixels[i], pixels[area + i], pixels[2 * area + i], 255], 4 * i);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

async function show(cell, label, cat) {
  const image = cell.querySelector("img"), seen = cat.seen && `judge sees: ${breedName(cat.seen.label)}, ${Math.round(100 * cat.seen.probability)}\u00a0%`;
  const blob = await new Promise((resolve) => picture(cat).toBlob(resolve, "image/png"));
  image.onload = () => URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  image.alt = `A drawn cat, ${breedName(label)}${seen ? `; ${seen}` : ""}`;
  cell.querySelector(".seen").textContent = seen ?? "";
}

function save() {
  const scale = Math.max(1, Math.round(CELL / about.image_size)), side = scale * about.image_size, caption = 20, gap = 8;
  const columns = Math.ceil(Math.sqrt(drawn.length)), rows = Math.ceil(drawn.length / columns);
  const sheet = document.createElement("canvas"), pen = sheet.getContext("2d");
  sheet.width = columns * (side + gap) + gap;
  sheet.height = rows * (side + caption + gap) + gap;
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.fillStyle = "#1f1d1a";
  pen.font = "13px system-ui, sans-serif";
  pen.imageSmoothingEnabled = false;
  drawn.forEach((cat, index) => {
    const x = gap + (index % columns) * (side + gap), y = gap + Math.floor(index / columns) * (side + caption + gap);
    pen.drawImage(picture(cat), x, y, side, side);
    pen.fillText(breedName(cat.label), x, y + side + 15, side);
  });
  sheet.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${about.name}-seed-${form.seed.value}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }, "image/png");
}

async function share() {
  byId("address").value = location.href;
  byId("link").hidden = false;
  byId("address").select();
  try {
    await navigator.clipboard.writeText(location.href);
    status.textContent = "The link is in the clipboard. Whoever opens it sees the same cats.";
  } catch {
    status.textContent = "Copy the link from the field below. Whoever opens it sees the same cats.";
  }
}

function failed(error) {
  console.error(error);
  byId("stop").hidden = true;
  status.textContent = "";
  problem(error instanceof Problem ? error.message : `The cats cannot be drawn: ${error?.message ?? error}. Reload the page, or use another browser.`);
}

function draw(before) {
  problem("");
  drawAll(before).catch(failed);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
byId("surprise").addEventListener("click", () => {
  form.seed.value = Math.floor(Math.random() * 1_000_000);
  if (form.reportValidity()) draw();
});
byId("stop").addEventListener("click", () => {
  drawing++;
  [...list.children].slice(drawn.length).forEach((cell) => cell.remove());
  finish(drawn.reduce((sum, cat) => sum + cat.milliseconds, 0));
});
byId("save").addEventListener("click", save);
byId("share").addEventListener("click", share);
addEventListener("hashchange", () => draw(fillForm()));

list.classList.toggle("small", about.image_size < 100);
list.style.setProperty("--cell", about.image_size < 100 ? "8rem" : "11rem");
const before = fillForm();
start().then(() => {
  for (const id of ["draw", "surprise"]) byId(id).disabled = false;
  draw(before);
}, failed);
