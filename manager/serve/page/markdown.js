// A little Markdown, as nodes: what a model writes never becomes HTML.

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

const INLINE = /(`+)([^`][\s\S]*?)\1|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;

function inline(text) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(last, found.index));
    if (found[2] !== undefined) nodes.push(element("code", found[2]));
    else if (found[3] !== undefined) nodes.push(element("strong", ...inline(found[3])));
    else nodes.push(element("em", ...inline(found[4])));
    last = found.index + found[0].length;
  }
  nodes.push(text.slice(last));
  return nodes;
}

function paragraph(lines) {
  const made = element("p");
  lines.forEach((line, at) => made.append(...(at ? [element("br")] : []), ...inline(line)));
  return made;
}

export function render(text) {
  const nodes = [];
  const lines = text.split("\n");
  let at = 0;
  let open = [];
  const close = () => {
    if (open.length) nodes.push(paragraph(open));
    open = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^\s*```/);
    const heading = line.match(/^(#{1,4})\s+(.*)/);
    const item = /^\s*([-*+]|\d+[.)])\s+/;
    if (fence) {
      close();
      const code = [];
      for (at += 1; at < lines.length && !/^\s*```\s*$/.test(lines[at]); at += 1) code.push(lines[at]);
      nodes.push(element("pre", element("code", code.join("\n"))));
    } else if (heading) {
      close();
      nodes.push(element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
    } else if (item.test(line)) {
      close();
      const list = element(/^\s*\d/.test(line) ? "ol" : "ul");
      for (; at < lines.length && item.test(lines[at]); at += 1) {
        list.append(element("li", ...inline(lines[at].replace(item, ""))));
      }
      nodes.push(list);
      at -= 1;
    } else if (!line.trim()) {
      close();
    } else {
      open.push(line);
    }
    at += 1;
  }
  close();
  return nodes;
}
