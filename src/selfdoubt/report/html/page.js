"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 200;
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Tables: a click on a header sorts by the numbers behind the cells; what has no number comes last.
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const header = button.parentElement, table = header.closest("table"), body = table.tBodies[0];
      const column = header.cellIndex, before = header.getAttribute("aria-sort");
      const first = header.dataset.first || "descending";
      const other = first === "descending" ? "ascending" : "descending";
      const way = before === first ? other : first;
      for (const th of header.parentElement.cells) th.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", way);
      const sign = way === "descending" ? -1 : 1;
      const value = (row) => row.cells[column].dataset.v;
      const rows = [...body.rows].map((row, place) => ({ row, place, v: value(row) }));
      const isText = rows.some(({ v }) => v !== undefined && v !== "" && Number.isNaN(Number(v)));
      rows.sort((a, b) => {
        const none = (x) => x.v === undefined || x.v === "";
        if (none(a) || none(b)) return none(a) - none(b) || a.place - b.place;
        const step = isText ? a.v.localeCompare(b.v) : Number(a.v) - Number(b.v);
        return sign * step || a.place - b.place;
      });
      body.append(...rows.map(({ row }) => row));
    });
  }
  for (const button of document.querySelectorAll("button[data-shows]")) {
    button.addEventListener("click", () => {
      document.getElementById(button.dataset.shows).classList.remove("short");
      button.remove();
    });
  }

  // The list of answers.
  const VERDICTS = { 1: ["right", "✓ right"], 0: ["wrong", "✗ wrong"] };
  const percent = (x) => {
    const whole = Math.round(100 * x);
    return whole === 100 && x < 1 ? ">99 %" : whole === 0 && x > 0 ? "<1 %" : `${whole} %`;
  };
  const level = (risk) => data.bounds.filter((bound) => risk > bound).length;
  const spoken = (answer, tokens) => {
    const said = make("p", "say");
    said.dir = "auto";
    if (tokens) {
      for (const [text, risk] of tokens) {
        const piece = make("span", `t t${level(risk)}`, text);
        piece.title = `${risk.toFixed(3)} nats`;
        said.append(piece);
      }
    } else if (answer === null) said.append(make("em", "", "no answer"));
    else said.textContent = answer;
    return said;
  };
  const item = (row) => {
    const li = make("li"), ask = make("p", "ask", row.q), facts = make("p", "facts");
    ask.dir = "auto";
    const [name, text] = VERDICTS[row.v] || ["unjudged", "– unjudged"];
    facts.append(make("span", name, text));
    const add = (known, words) => { if (known !== undefined && known !== null) facts.append(make("span", "", words)); };
    if (row.w) facts.append(make("span", "", "abstained"));
    add(row.k, `p_correct ${percent(row.k)}`);
    add(row.h, `riskier than ${percent(row.h)} of these answers`);
    add(row.p, `than ${percent(row.p)} of the reference answers`);
    add(row.o, row.o);
    add(row.n, row.n);
    li.append(ask, spoken(row.a, row.t), facts);
    const more = [];
    if (row.s) more.push(["accepted", row.s.join(" · ")]);
    if (row.c) more.push(["passage", row.c]);
    const detail = make("details"), summary = make("summary", "", "more");
    detail.append(summary);
    detail.addEventListener("toggle", () => {
      if (detail.childElementCount > 1) return;
      for (const [what, words] of [["id", row.i], ...more]) {
        const line = make("p");
        line.dir = "auto";
        line.append(make("small", "", `${what}: `), words);
        detail.append(line);
      }
      for (const [words, risk, right] of row.m || []) {
        const line = make("p");
        line.dir = "auto";
        const verdict = right === null ? "– unjudged" : VERDICTS[right][1];
        line.append(make("small", "", `drawn, ${verdict}, risk ${risk.toFixed(3)}: `), words);
        detail.append(line);
      }
    });
    li.append(detail);
    return li;
  };

  const form = document.getElementById("filters"), list = document.getElementById("answers");
  const count = document.getElementById("count"), more = document.getElementById("more");
  if (!form) return;
  const hay = data.answers.map((row) => [row.q, row.a, row.i, row.o].join("\n").toLowerCase());
  const places = data.answers.map((_, i) => i);
  const risk = (i) => (data.answers[i].h === undefined ? -1 : data.answers[i].h);
  const sorted = {
    file: places,
    riskiest: [...places].sort((a, b) => risk(b) - risk(a) || a - b),
    surest: [...places].sort((a, b) => risk(a) - risk(b) || a - b),
  };
  const judgement = {
    all: () => true,
    right: (row) => row.v === 1,
    wrong: (row) => row.v === 0,
    unjudged: (row) => row.v === null,
    abstained: (row) => row.w === true,
    answered: (row) => row.w === false,
  };
  let found = [], shown = 0;
  const next = () => {
    const part = found.slice(shown, shown + PAGE);
    list.append(...part.map((i) => item(data.answers[i])));
    shown += part.length;
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
    count.textContent = `${found.length} of ${data.answers.length} answers` + (shown < found.length ? `, ${shown} shown` : "");
  };
  const filter = () => {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const keep = judgement[form.elements.judgement.value], topic = form.elements.topic ? form.elements.topic.value : "";
    found = sorted[form.elements.order.value].filter((i) => {
      const row = data.answers[i];
      return keep(row) && (!topic || row.o === topic.slice(1)) && words.every((w) => hay[i].includes(w));
    });
    list.replaceChildren();
    shown = 0;
    next();
  };
  let waiting;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 80); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", next);
  form.hidden = false;
  filter();
})();
