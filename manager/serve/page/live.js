// The train: workers in order, and what moves between them.

import { events } from "./api.js";

const $ = (id) => document.getElementById(id);
const HISTORY = 120;
const rates = [];
const wagons = new Map(); // address -> its parts
let last = null;
let lostAt = 0;
let shape = "";

const size = (bytes) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (bytes >= 999.5 && power < 4) [bytes, power] = [bytes / 1000, power + 1];
  return `${power ? bytes.toFixed(bytes < 10 ? 1 : 0) : bytes} ${units[power]}`;
};
const ms = (seconds) => (seconds == null ? "–" : `${(seconds * 1000).toFixed(seconds < 0.01 ? 2 : 1)} ms`);

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function fact(title) {
  const value = make("b", "", "–");
  return [make("span", "", `${title} `, value), value];
}

export async function watch() {
  for (;;) {
    try {
      for await (const seen of events("/live")) show(seen);
    } catch (error) {
      if (error.status === 401) document.dispatchEvent(new Event("key-wanted"));
    }
    pill("gone", "not connected");
    await new Promise((done) => setTimeout(done, 1500));
  }
}

function pill(state, text) {
  const node = $("state");
  if (node.dataset.state !== state) node.dataset.state = state;
  if (node.lastElementChild.textContent !== text) node.lastElementChild.textContent = text;
}

function note(text) {
  const time = make("time", "", new Date().toLocaleTimeString());
  $("events").prepend(make("li", "", time, text));
  while ($("events").children.length > 12) $("events").lastElementChild.remove();
}

function show(seen) {
  pill(seen.state, { ready: "ready", loading: "loading", lost: "recovering", draining: "leaving" }[seen.state] || seen.state);
  $("rate").textContent = seen.tokens_per_s < 100 ? seen.tokens_per_s.toFixed(1) : Math.round(seen.tokens_per_s);
  $("running").textContent = seen.running;
  $("waiting").textContent = seen.waiting;
  $("flight").textContent = seen.steps_in_flight;
  const used = seen.kv_blocks - seen.kv_blocks_free;
  $("kv").textContent = `${used} of ${seen.kv_blocks} blocks`;
  $("kv-bar").style.width = `${seen.kv_blocks ? (100 * used) / seen.kv_blocks : 0}%`;
  rates.push(seen.tokens_per_s);
  if (rates.length > HISTORY) rates.shift();
  sparkline();
  trouble(seen);
  train(seen);
  last = seen;
}

function trouble(seen) {
  const box = $("trouble");
  const was = last?.state;
  if (seen.state === "lost" && was !== "lost") {
    lostAt = performance.now();
    note(seen.reason);
  }
  if (seen.state === "ready" && was === "lost") {
    const seconds = ((performance.now() - lostAt) / 1000).toFixed(1);
    box.textContent = `Whole again after ${seconds} s.`;
    box.className = "mended";
    box.hidden = false;
    note(box.textContent);
    setTimeout(() => { if (box.className === "mended") box.hidden = true; }, 8000);
  } else if (seen.state === "lost" || (seen.state === "loading" && seen.reason)) {
    box.textContent = seen.reason;
    box.className = "";
    box.hidden = false;
  } else if (box.className !== "mended") {
    box.hidden = true;
  }
}

function train(seen) {
  const now = seen.workers.map((it) => `${it.address} ${it.start_layer}:${it.end_layer}`).join("|");
  if (now !== shape) {
    shape = now;
    build(seen);
  }
  for (const worker of seen.workers) refresh(worker, seen);
}

function build(seen) {
  wagons.clear();
  const engine = make("div", "wagon engine");
  engine.append(
    make("div", "top", make("b", "", "manager"), make("span", "where", seen.model || "")),
    make("div", "facts", "tokenizer, embeddings, scheduler"),
    make("div", "wheels", make("i"), make("i")),
  );
  const parts = [engine];
  seen.workers.forEach((worker, at) => {
    const label = make("span", "", at ? `${size(seen.hidden_bytes)} a token` : "embeddings");
    const rail = make("div", "rail", label);
    const busy = make("span", "busy", "");
    const windows = make("div", "windows");
    for (let layer = worker.start_layer; layer < worker.end_layer; layer += 1) {
      const one = make("i");
      one.title = `layer ${layer}`;
      windows.append(one);
    }
    const facts = {};
    const line = make("div", "facts numbers");
    for (const title of ["step", "RTT", "memory", "KV"]) {
      const [node, value] = fact(title);
      facts[title] = value;
      line.append(node);
    }
    const count = worker.end_layer - worker.start_layer;
    const title = make("b", "", `layers ${worker.start_layer}–${worker.end_layer - 1}`);
    title.title = `${count} of ${seen.num_layers}`;
    const node = make("div", "wagon");
    node.dataset.address = worker.address;
    node.append(
      make("div", "top", title, busy),
      make("div", "where", `${worker.host} · ${worker.address} · ${worker.device} · ${worker.dtype} · ${size(worker.stage_bytes)}`),
      windows, line, make("div", "wheels", make("i"), make("i")),
    );
    parts.push(rail, node);
    wagons.set(worker.address, { node, rail, busy, windows: [...windows.children], facts, steps: worker.steps, lit: 0 });
  });
  if (seen.workers.length) parts.push(make("p", "home", "↺ the last wagon draws the token and sends it straight home"));
  $("train").replaceChildren(...parts);
}

function refresh(worker, seen) {
  const wagon = wagons.get(worker.address);
  const wasLost = wagon.node.classList.contains("lost");
  wagon.node.classList.toggle("lost", worker.lost);
  wagon.rail.classList.toggle("broken", worker.lost);
  if (wasLost && !worker.lost) {
    wagon.node.classList.add("back");
    setTimeout(() => wagon.node.classList.remove("back"), 1500);
  }
  const share = Math.round(100 * worker.busy);
  wagon.busy.textContent = worker.lost ? "lost" : `${share} % busy`;
  wagon.facts.step.textContent = ms(worker.step_s);
  wagon.facts.RTT.textContent = ms(worker.rtt_s);
  wagon.facts.memory.textContent = size(worker.gpu_memory_bytes ?? worker.memory_bytes);
  wagon.facts.KV.textContent = `${Math.round((100 * (worker.kv_total - worker.kv_free)) / (worker.kv_total || 1))} % leased`;
  const steps = seen.state === "ready" ? Math.max(0, worker.steps - wagon.steps) : 0;
  wagon.steps = worker.steps;
  const lit = worker.lost ? 0 : steps ? Math.max(1, Math.round(wagon.windows.length * Math.max(worker.busy, 0.15))) : 0;
  wagon.lit = (wagon.lit + 1) % wagon.windows.length; // the light walks through the wagon
  wagon.windows.forEach((one, at) => {
    const place = (at - wagon.lit + wagon.windows.length) % wagon.windows.length;
    one.classList.toggle("lit", place < lit);
  });
  for (let at = 0; at < Math.min(steps, 5); at += 1) setTimeout(() => travel(wagon), (250 * at) / Math.min(steps, 5));
}

function travel(wagon) {
  if (document.hidden || !wagon.rail.isConnected) return;
  const spark = make("div", "spark");
  wagon.rail.append(spark);
  const height = wagon.rail.clientHeight;
  const flight = spark.animate(
    [
      { transform: "translateY(0) scale(.5)", opacity: 0 },
      { transform: `translateY(${height * 0.3}px) scale(1)`, opacity: 1, offset: 0.3 },
      { transform: `translateY(${height}px) scale(.6)`, opacity: 0 },
    ],
    { duration: 430, easing: "ease-in-out" },
  );
  flight.onfinish = () => spark.remove();
}

function sparkline() {
  const canvas = $("spark");
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  const style = getComputedStyle(document.documentElement);
  const most = Math.max(1, ...rates);
  const x = (at) => width - (rates.length - 1 - at) * (width / (HISTORY - 1));
  const y = (rate) => height - 3 - (rate / most) * (height - 8);
  pen.clearRect(0, 0, width, height);
  pen.beginPath();
  rates.forEach((rate, at) => (at ? pen.lineTo(x(at), y(rate)) : pen.moveTo(x(at), y(rate))));
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2.5;
  pen.lineJoin = "round";
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(x(0), height);
  pen.globalAlpha = 0.16;
  pen.fillStyle = style.getPropertyValue("--accent");
  pen.fill();
  pen.globalAlpha = 1;
}
