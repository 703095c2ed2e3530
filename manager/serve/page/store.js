// What stays in this browser: conversations, settings, the theme and the API key.

const KEY = "comboio";
export const DEFAULTS = {
  system: "", temperature: 0.7, top_p: 0.95, min_p: 0, repetition_penalty: 1.05, max_tokens: 512, seed: "", key: "",
};
const MAX_CONVERSATIONS = 200;

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) || {};
  } catch {
    return {};
  }
}

const kept = read();
export const settings = { ...DEFAULTS, ...kept.settings };
export const state = {
  conversations: Array.isArray(kept.conversations) ? kept.conversations : [],
  current: kept.current || null,
  theme: kept.theme || null,
  model: kept.model || null,
};

export function save() {
  state.conversations = state.conversations.slice(0, MAX_CONVERSATIONS);
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...state, settings }));
  } catch {
    // Full, or forbidden: the page goes on without a memory.
  }
}

export function conversation() {
  let found = state.conversations.find((it) => it.id === state.current);
  if (!found) {
    found = { id: Math.random().toString(36).slice(2), title: "", messages: [] };
    state.conversations.unshift(found);
    state.current = found.id;
  }
  return found;
}
