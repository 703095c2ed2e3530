// Puts the page together: buttons, drawers, settings, theme.

import { models } from "./api.js";
import * as chat from "./chat.js";
import { watch } from "./live.js";
import { DEFAULTS, save, settings, state } from "./store.js";

const $ = (id) => document.getElementById(id);
const prompt = $("prompt");
const drawers = { "open-settings": $("settings"), "open-conversations": $("conversations") };

function drawer(open) {
  for (const it of Object.values(drawers)) it.classList.toggle("open", it === open && !it.classList.contains("open"));
  $("shade").hidden = !Object.values(drawers).some((it) => it.classList.contains("open"));
}
for (const [id, it] of Object.entries(drawers)) $(id).onclick = () => drawer(it);
$("shade").onclick = () => drawer(null);
document.addEventListener("keydown", (event) => event.key === "Escape" && drawer(null));
document.addEventListener("picked", () => drawer(null));

for (const view of ["chat", "live"]) {
  $(`tab-${view}`).onclick = () => {
    document.querySelector("main").dataset.view = view;
    for (const other of ["chat", "live"]) $(`tab-${other}`).setAttribute("aria-pressed", String(other === view));
  };
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("stop").hidden) return;
  const text = prompt.value;
  prompt.value = "";
  grow();
  chat.send(text);
});
$("stop").onclick = chat.stop;
$("new-chat").onclick = () => {
  chat.begin();
  drawer(null);
};

function showSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    $(name).value = settings[name];
    const out = $(`${name}-out`);
    if (out) out.textContent = Number(settings[name]).toFixed(2);
  }
}
for (const name of Object.keys(DEFAULTS)) {
  $(name).addEventListener("input", () => {
    settings[name] = $(name).value;
    save();
    showSettings();
  });
}
$("key").addEventListener("change", load);
$("reset").onclick = () => {
  Object.assign(settings, DEFAULTS, { key: settings.key });
  save();
  showSettings();
};

const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  document.documentElement.dataset.theme = state.theme || (dark.matches ? "dark" : "light");
}
dark.addEventListener("change", paint);
$("theme").onclick = () => {
  state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  save();
  paint();
};

let asked = false;
document.addEventListener("key-wanted", () => {
  if (asked) return;
  asked = true;
  drawer($("settings"));
  $("key").placeholder = "this server wants one";
  $("key").focus();
});

const known = new Map();
async function load() {
  try {
    const found = await models();
    const picked = found.find((it) => it.id === state.model) || found[0];
    known.clear();
    for (const it of found) known.set(it.id, it);
    $("model").replaceChildren(...found.map((it) => new Option(it.id, it.id, false, it === picked)));
    chat.useModel(picked);
  } catch (error) {
    if (error.status === 401) document.dispatchEvent(new Event("key-wanted"));
    else setTimeout(load, 1000);
  }
}
$("model").onchange = () => {
  state.model = $("model").value;
  save();
  chat.useModel(known.get(state.model));
};

paint();
showSettings();
chat.show();
load();
watch();
