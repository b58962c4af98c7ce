// The conversation on the page. Gradio runs this once and hands in: element (where the conversation is), trigger (tell
// Python), props (props.value is what Python shows) and watch. Nothing that a person or a model wrote becomes markup
// here: Python has escaped what is HTML, and everything else is put in as text.
const turns = element.querySelector(".turns"), notice = element.querySelector(".notice");
const voice = element.querySelector("[aria-live]"), known = new Map();
const root = document.documentElement, hint = element.querySelector(".hint");

// ---- What Python shows ------------------------------------------------------------------------------------------

function show() {
  const value = props.value || {};
  const follow = window.innerHeight + window.scrollY >= root.scrollHeight - 120;
  const order = value.order || [];
  for (const [id, turn] of known) if (!order.includes(id)) { turn.node.remove(); known.delete(id); }
  for (const turn of value.turns || []) if (order.includes(turn.id)) draw(turn);
  order.forEach((id, i) => {
    const node = known.get(id)?.node;
    if (node && turns.children[i] !== node) turns.insertBefore(node, turns.children[i] || null);
  });
  element.classList.toggle("begun", order.length > 0);
  element.classList.toggle("busy", Boolean(value.busy));
  for (const [id, turn] of known) turn.node.classList.toggle("editing", id === value.editing);
  hint.textContent = value.editing ? "Ask puts the new question in the place of the old one. Escape leaves the old one as it is." : "";
  if (notice.textContent !== (value.notice || "")) notice.textContent = value.notice || "";
  if (value.file) save(value.file);
  if (follow && order.length) window.scrollTo(0, root.scrollHeight);
}

function draw(turn) {
  let mine = known.get(turn.id);
  if (!mine) {
    mine = { node: document.createElement("article"), parts: {}, frame: null, spoken: "" };
    mine.node.className = "turn";
    mine.node.dataset.turn = turn.id;
    known.set(turn.id, mine);
    turns.append(mine.node);
  }
  mine.node.dataset.state = turn.state;
  if (mine.frame !== turn.frame) reframe(mine, turn.frame);
  for (const place of mine.node.querySelectorAll("[data-part]")) {
    const had = mine.parts[place.dataset.part] || "", has = turn.parts[place.dataset.part] || "";
    if (had === has) continue;
    if (had && has.startsWith(had)) place.insertAdjacentHTML("beforeend", has.slice(had.length));
    else replace(place, has);
    mine.parts[place.dataset.part] = has;
  }
  if (turn.spoken && mine.spoken !== turn.spoken) voice.textContent = turn.spoken;
  mine.spoken = turn.spoken;
}

function reframe(mine, frame) { // places that stay keep their content, and the focus within
  const old = new Map([...mine.node.querySelectorAll("[data-part]")].map(e => [e.dataset.part, e]));
  const focus = document.activeElement, box = document.createElement("div");
  box.innerHTML = frame;
  for (const place of box.querySelectorAll("[data-part]")) {
    if (old.has(place.dataset.part)) place.replaceWith(old.get(place.dataset.part));
    else delete mine.parts[place.dataset.part];
  }
  mine.node.replaceChildren(...box.childNodes);
  mine.frame = frame;
  if (mine.node.contains(focus)) focus.focus({ preventScroll: true });
}

function replace(place, html) {
  const inside = place.contains(document.activeElement) ? document.activeElement.dataset.k : undefined;
  place.innerHTML = html;
  if (inside !== undefined) place.querySelector(`[data-k="${inside}"]`)?.focus({ preventScroll: true });
}

// ---- The card of one token --------------------------------------------------------------------------------------

const card = document.createElement("div");
card.id = "sd-card";
card.setAttribute("role", "tooltip");
card.hidden = true;
document.body.append(card);
const nats = v => v.toFixed(3).replace(/^-(0\.0+)$/, "$1");
let pointed = null, closing = 0;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function visible(tag, name, text) { // spaces at the ends and ends of lines can be seen
  const made = make(tag, name);
  for (const piece of (text || "·").split(/(^ +| +$|\n)/)) {
    const mark = /^ +$/.test(piece) ? piece.replace(/ /g, "␣") : piece === "\n" ? "↵" : "";
    if (piece) made.append(mark ? make("span", "space", mark) : piece);
  }
  return made;
}
const percent = p => p >= .9995 ? "> 99.9 %" : p < .0005 ? "< 0.1 %" : `${(p * 100).toFixed(1)} %`;

function open(token) {
  if (!token?.dataset?.d) return;
  clearTimeout(closing);
  if (pointed === token && !card.hidden) return;
  close();
  const [logprob, total, epistemic, aleatoric, disagreement, risk, rank, others] = JSON.parse(token.dataset.d);
  const head = make("p", "head");
  const chance = make("span", "", percent(Math.exp(logprob)));
  chance.dataset.name = "probability";
  chance.prepend(make("small", "", "probability "));
  head.append(visible("b", `t t${rank}`, token.textContent), chance);
  const list = make("dl");
  const rows = { logprob, risk, total, epistemic, aleatoric };
  for (const [name, value] of [...Object.entries(rows).map(([k, v]) => [k, nats(v)]), ["disagreement", percent(disagreement)]]) {
    const dd = make("dd", "", value);
    dd.dataset.name = name;
    list.append(make("dt", "", name), dd);
  }
  card.replaceChildren(head, list);
  if (others.length) {
    const table = make("ul");
    for (const [text, p, chosen] of others) {
      const item = make("li", chosen ? "chosen" : ""), bar = make("i");
      bar.style.width = `${Math.max(1, p * 100)}%`;
      item.append(bar, visible("span", "", text), make("small", "", percent(p)));
      table.append(item);
    }
    card.append(make("p", "sub", "It could have said"), table);
  }
  card.hidden = false;
  pointed = token;
  token.classList.add("on");
  token.setAttribute("aria-describedby", card.id);
  const t = token.getClientRects()[0] || token.getBoundingClientRect(), c = card.getBoundingClientRect();
  const wide = root.clientWidth, below = t.bottom + 8 + c.height <= window.innerHeight;
  card.style.left = `${Math.max(8, Math.min(t.left - 12, wide - c.width - 8))}px`;
  card.style.top = `${below ? t.bottom + 8 : Math.max(8, t.top - 8 - c.height)}px`;
  cursor(token);
}

function close() {
  clearTimeout(closing);
  card.hidden = true;
  pointed?.classList.remove("on");
  pointed?.removeAttribute("aria-describedby");
  pointed = null;
  document.querySelectorAll(".plot .cursor").forEach(c => c.remove());
}

const soon = () => { clearTimeout(closing); closing = setTimeout(close, 120); };

element.addEventListener("pointerover", e => {
  const token = e.target.closest?.(".t[data-d]");
  if (token && e.pointerType !== "touch") open(token);
});
element.addEventListener("pointerout", e => {
  if (e.target.closest?.(".t[data-d]") && e.pointerType !== "touch" && document.activeElement !== pointed) soon();
});
card.addEventListener("pointerenter", () => clearTimeout(closing));
card.addEventListener("pointerleave", soon);
element.addEventListener("focusin", e => {
  if (e.target.matches?.(".t[data-d]") && e.target.matches(":focus-visible")) open(e.target); else close();
});
element.addEventListener("focusout", e => { if (e.target === pointed) close(); });
document.addEventListener("click", e => {
  const token = e.target.closest?.(".t[data-d]");
  if (token && element.contains(token)) open(token);
  else if (!card.contains(e.target)) close();
});
window.addEventListener("scroll", () => { if (pointed && document.activeElement !== pointed) close(); }, { passive: true });

element.addEventListener("keydown", e => {
  const token = e.target.closest?.(".t[data-d]");
  if (!token) return;
  const row = [...token.closest("[role=group]").querySelectorAll(".t[data-d]")], at = row.indexOf(token);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: row.length - 1 }[e.key];
  if (to !== undefined && row[to]) {
    e.preventDefault();
    token.tabIndex = -1;
    row[to].tabIndex = 0;
    row[to].focus();
    open(row[to]);
  } else if (e.key === "Enter" || e.key === " ") {
    e.preventDefault();
    if (card.hidden) open(token); else close();
  }
});
document.addEventListener("keydown", e => {
  if (e.key !== "Escape") return;
  if (!card.hidden) close();
  else if (hint.textContent) { trigger("act", { do: "edit", turn: 0 }); type(""); }
  else if (document.body.classList.contains("sd-open")) drawer(false);
});

// ---- The plot: pointing at a bar points at its token -------------------------------------------------------------

function cursor(token) {
  document.querySelectorAll(".plot .cursor").forEach(c => c.remove());
  const say = token.closest("[data-part]")?.dataset.part;
  const figure = token.closest(".turn")?.querySelector(`.plot[data-of="${say}"]`);
  if (!figure) return;
  const mark = make("i", "cursor"), n = Number(figure.dataset.n);
  mark.style.left = `${Number(token.dataset.k) / n * 100}%`;
  mark.style.width = `${100 / n}%`;
  figure.querySelector(".canvas").append(mark);
}

function barAt(e) {
  const canvas = e.target.closest?.(".plot .canvas");
  if (!canvas) return null;
  const figure = canvas.closest(".plot"), box = canvas.getBoundingClientRect();
  const k = Math.floor((e.clientX - box.left) / box.width * Number(figure.dataset.n));
  return figure.closest(".turn").querySelector(`[data-part="${figure.dataset.of}"] [data-k="${k}"]`);
}
element.addEventListener("pointermove", e => { const token = barAt(e); if (token) open(token); });
element.addEventListener("pointerdown", e => { const token = barAt(e); if (token) setTimeout(() => open(token)); });
element.addEventListener("pointerout", e => { if (e.target.closest?.(".plot .canvas")) soon(); });

// ---- Buttons ----------------------------------------------------------------------------------------------------

function type(text) {
  const box = document.querySelector("#sd-typed textarea, #sd-typed input");
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
  box.focus();
  box.setSelectionRange?.(text.length, text.length);
}

function drawer(on) {
  const button = document.querySelector("[data-do=drawer]");
  document.body.classList.toggle("sd-open", on);
  button.setAttribute("aria-expanded", on);
  if (on) document.querySelector("#sd-side input")?.focus(); else button.focus();
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.text);
  } catch { // without a secure context
    const box = make("textarea", "sr", "");
    box.value = button.dataset.text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function save({ name, text }) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

document.addEventListener("click", e => {
  const button = e.target.closest?.("[data-do], [data-act], [data-ask]");
  if (!button) return;
  const turn = Number(button.closest(".turn")?.dataset.turn || 0), what = button.dataset;
  if (what.ask !== undefined) trigger("act", { do: "ask", text: what.ask });
  else if (what.act) trigger("act", { do: what.act, turn });
  else if (what.do === "copy") copy(button);
  else if (what.do === "edit") { trigger("act", { do: "edit", turn }); type(what.text); }
  else if (what.do === "drawer") drawer(!document.body.classList.contains("sd-open"));
  else if (what.do === "theme") theme(!document.body.classList.contains("dark"));
});

function theme(dark) { // from here on this page's own choice
  document.body.classList.toggle("dark", dark);
  try { sessionStorage.setItem("sd-dark", dark ? "1" : ""); } catch { /* a browser that keeps nothing */ }
}
try {
  const dark = sessionStorage.getItem("sd-dark");
  if (dark !== null) document.body.classList.toggle("dark", dark === "1");
} catch { /* a browser that keeps nothing */ }

function begin(tries) { // the field may come later than this; on a phone the focus would bring up the keyboard
  const box = document.querySelector("#sd-typed textarea, #sd-typed input");
  if (box) box.focus(); else if (tries) setTimeout(begin, 50, tries - 1);
}
if (matchMedia("(hover: hover)").matches) begin(100);

watch("value", show);
show();
