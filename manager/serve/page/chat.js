// The conversation: what is sent, what streams back, and how it is shown.

import { events, Refused } from "./api.js";
import { render } from "./markdown.js";
import { conversation, save, settings, state } from "./store.js";

const $ = (id) => document.getElementById(id);
const TRIES = {
  chat: ["Tell me a story about a night train.", "Explain pipelines to a child.", "Write a haiku about rails."],
  plain: ["def fibonacci(n):", "import os\n\n", "class Train:"],
};
let running = null; // an AbortController while an answer streams
let model = null;

export function useModel(chosen) {
  model = chosen;
  $("hint").textContent = chosen && !chosen.chat ? "This model has no chat template: it continues what you write." : "";
  if (!conversation().messages.length) show();
}

export function show() {
  const box = $("messages");
  const { messages } = conversation();
  box.replaceChildren(...(messages.length ? messages.map(bubble) : [welcome()]));
  box.scrollTop = box.scrollHeight;
  list();
}

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function welcome() {
  const picture = make("img");
  picture.src = "/assets/icon.svg";
  picture.alt = "";
  const tries = make("div", "tries");
  for (const text of TRIES[model && !model.chat ? "plain" : "chat"]) {
    const button = make("button", "", text.trim());
    button.type = "button";
    button.onclick = () => send(text);
    tries.append(button);
  }
  const note = make("p", "", "Your words travel through every wagon, and a token comes back.");
  return make("div", "welcome", picture, make("h1", "", "All aboard"), note, tries);
}

function bubble(message, at) {
  const isLast = at === conversation().messages.length - 1;
  const node = make("article", `message ${message.role}`);
  const text = make("div", "text");
  node.append(text);
  fill(node, text, message);
  if (message.role === "assistant" && !(isLast && running)) node.append(foot(message, isLast));
  return node;
}

function fill(node, text, message) {
  const isPlain = message.role === "user" || message.plain;
  node.classList.toggle("plain", Boolean(message.plain));
  text.replaceChildren(...(isPlain ? [message.content] : render(message.content)));
  if (message.error) text.append(make("div", "error", message.error));
}

function foot(message, isLast) {
  const made = make("div", "foot");
  if (message.stats) made.append(make("span", "", message.stats));
  const copy = make("button", "", "Copy");
  copy.onclick = () => navigator.clipboard?.writeText(message.content).then(() => (copy.textContent = "Copied"));
  made.append(copy);
  if (isLast) {
    const again = make("button", "regenerate", "Regenerate");
    again.onclick = () => {
      conversation().messages.pop();
      answer();
    };
    made.append(again);
  }
  return made;
}

export function list() {
  const items = state.conversations.filter((it) => it.messages.length).map((it) => {
    const name = make("button", "name", it.title || "New conversation");
    name.onclick = () => {
      stop();
      state.current = it.id;
      save();
      show();
      document.dispatchEvent(new Event("picked"));
    };
    const remove = make("button", "remove", "×");
    remove.title = "Delete";
    remove.onclick = () => {
      if (it.id === state.current) stop();
      state.conversations = state.conversations.filter((other) => other !== it);
      save();
      show();
    };
    const item = make("li", "", name, remove);
    item.setAttribute("aria-current", String(it.id === state.current));
    return item;
  });
  $("list").replaceChildren(...items);
}

export function begin() {
  stop();
  state.current = null;
  conversation();
  save();
  show();
  $("prompt").focus();
}

export function send(text) {
  if (running || !text.trim()) return;
  const talk = conversation();
  talk.messages.push({ role: "user", content: text });
  talk.title ||= text.trim().split("\n")[0].slice(0, 60);
  answer();
}

export function stop() {
  running?.abort();
}

function request(messages) {
  const wanted = { model: model?.id, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "min_p", "repetition_penalty"]) wanted[name] = Number(settings[name]);
  if (settings.seed !== "") wanted.seed = Math.trunc(Number(settings.seed));
  wanted.max_tokens = Math.max(1, Math.trunc(Number(settings.max_tokens)) || 512);
  if (model && !model.chat) {
    return ["/v1/completions", { ...wanted, prompt: messages.map((it) => it.content).join("") }];
  }
  const said = messages.filter((it) => it.content).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) said.unshift({ role: "system", content: settings.system });
  return ["/v1/chat/completions", { ...wanted, messages: said }];
}

async function answer() {
  const talk = conversation();
  const [path, body] = request(talk.messages);
  const message = { role: "assistant", content: "", plain: Boolean(model && !model.chat) };
  talk.messages.push(message);
  running = new AbortController();
  const mine = running;
  busy(true);
  show();
  const box = $("messages");
  const node = box.lastElementChild;
  const text = node.querySelector(".text");
  node.classList.add("busy");
  const started = performance.now();
  let first = 0;
  let tokens = 0;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 90;
    fill(node, text, message);
    if (follows) box.scrollTop = box.scrollHeight;
  };
  try {
    for await (const event of events(path, body, mine.signal)) {
      if (event.error) throw new Refused(0, event.error.message);
      const choice = event.choices[0];
      const more = choice && (choice.text ?? choice.delta?.content ?? "");
      if (more) {
        first ||= performance.now();
        tokens += 1;
        message.content += more;
        frame ||= requestAnimationFrame(draw);
      }
      if (event.usage) tokens = event.usage.completion_tokens;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      message.error = error instanceof Refused ? error.message : "The server cannot be reached.";
      if (error.status === 401) document.dispatchEvent(new Event("key-wanted"));
    }
  }
  cancelAnimationFrame(frame);
  if (first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    message.stats = `${tokens} tokens${rate} · first after ${((first - started) / 1000).toFixed(2)} s`;
  }
  running = null;
  busy(false);
  save();
  if (talk === conversation()) show();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}
