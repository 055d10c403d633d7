"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const SHOWN = 100; // rows of the table of edits that are drawn at once
  const DASH = { "now": "", "right after": "6 4", "unedited": "1 4" };
  const $ = (id) => document.getElementById(id);

  // An element. Text from data only ever becomes text, never markup.
  function make(name, fields = {}, ...inside) {
    const one = document.createElement(name);
    for (const [key, value] of Object.entries(fields)) {
      if (key in one && typeof value !== "string") one[key] = value;
      else if (key === "text") one.textContent = value;
      else one.setAttribute(key === "kind" ? "class" : key, value);
    }
    one.append(...inside.filter((part) => part !== null && part !== undefined));
    return one;
  }
  function draw(name, fields, text) {
    const one = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(fields)) one.setAttribute(key, value);
    if (text !== undefined) one.textContent = text;
    return one;
  }
  const colour = (run) => `var(--c${run.colour % 8})`;
  const number = (value) =>
    value === null || value === undefined ? ""
      : Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2)
        : String(+value.toPrecision(4));

  // Light and dark: as the system has it, until the button says otherwise.
  function theme() {
    const asked = matchMedia("(prefers-color-scheme: dark)"), button = $("theme"), root = document.documentElement;
    let chosen = null;
    try { chosen = localStorage.getItem("d4s-theme"); } catch { /* a page of its own has no storage in some browsers */ }
    const show = () => {
      const now = chosen || (asked.matches ? "dark" : "light");
      root.dataset.theme = now;
      button.textContent = now === "dark" ? "light page" : "dark page";
    };
    button.hidden = false;
    button.addEventListener("click", () => {
      chosen = root.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("d4s-theme", chosen); } catch { /* then it lasts as long as the page */ }
      show();
    });
    asked.addEventListener("change", show);
    addEventListener("beforeprint", () => { root.dataset.theme = "light"; });
    addEventListener("afterprint", show);
    show();
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  // Curves

  function ticks(low, high, most = 5) {
    const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }

  // From a range of values to heights. Decades apart: logarithmic, and linear next to 0.
  function scale(values, range) {
    if (range) return { at: (v) => (v - range[0]) / (range[1] - range[0]), ticks: ticks(...range), log: false };
    let low = Math.min(0, ...values), high = Math.max(...values, low + 1e-9);
    const sizes = values.map(Math.abs).filter((one) => one > 0);
    const largest = Math.max(...sizes), median = sizes.sort((a, b) => a - b)[sizes.length >> 1];
    if (sizes.length && largest / median > 30) {
      const small = median, bend = (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / small);
      const from = bend(low), to = bend(high), found = [0];
      const first = Math.ceil(Math.log10(small)), last = Math.floor(Math.log10(high));
      const every = Math.max(1, Math.ceil((last - first + 1) / 5));
      for (let power = first; power <= last; power += every) found.push(10 ** power);
      return { at: (v) => (bend(v) - from) / (to - from), ticks: found, log: true };
    }
    const found = ticks(low, high);
    high = Math.max(high, found[found.length - 1]);
    return { at: (v) => (v - low) / (high - low), ticks: found, log: false };
  }

  function panel(about, runs, shown) {
    const W = 360, H = 220, L = 46, R = 10, T = 10, B = 34;
    const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: "0", role: "img" });
    const said = make("output", { "aria-live": "polite" });
    const unit = about.unit ? ` ${about.unit}` : "";
    const note = make("span", {});
    const figure = make("figure", {}, make("figcaption", {}, make("b", { text: about.title + (about.unit ? ` (${about.unit})` : "") }), about.meaning, note), svg, said);
    const table = make("details", {}, make("summary", { text: "numbers" }));
    figure.append(table);
    let lines = [], xs = [], place = -1, left, cross;

    function paint() {
      lines = about.lines.filter((line) => shown[line.run]);
      svg.replaceChildren();
      place = -1;
      said.replaceChildren();
      xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      svg.setAttribute("aria-label", `${about.title} against ${about.x}: ${lines.length} curves. Arrow keys read the figures.`);
      if (!xs.length) return;
      const values = lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]).filter((v) => v !== null);
      const first = about.x === "edit" ? 0 : xs.length > 1 ? Math.min(xs[0], 0) : 0, last = xs[xs.length - 1];
      left = (x) => L + (W - L - R) * (last > first ? (x - first) / (last - first) : .5);
      const y = scale(values, about.range), top = (v) => H - B - (H - B - T) * y.at(v);
      note.textContent = y.log ? " (logarithmic)" : "";
      for (const tick of y.ticks) {
        svg.append(draw("line", { class: "grid", x1: L, x2: W - R, y1: top(tick), y2: top(tick) }));
        svg.append(draw("text", { x: L - 6, y: top(tick) + 4, "text-anchor": "end" }, Math.abs(tick) >= 1e5 ? tick.toExponential(0) : tick.toLocaleString("en")));
      }
      for (const tick of ticks(first, last)) svg.append(draw("text", { x: left(tick), y: H - B + 16, "text-anchor": "middle" }, tick.toLocaleString("en")));
      svg.append(draw("text", { x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle" }, about.x));
      for (const line of lines) {
        const whole = line.x.map((x, i) => [x, line.y[i], line.low && line.low[i], line.high && line.high[i]]).filter((p) => p[1] !== null);
        const bounds = line.low && whole.filter((p) => p[2] !== null && p[3] !== null);
        if (bounds && bounds.length > 1) {
          const edge = [...bounds.map((p) => [p[0], p[3]]), ...bounds.reverse().map((p) => [p[0], p[2]])];
          svg.append(draw("path", { class: "band", fill: colour(runs[line.run]), d: path(edge, top) }));
        } else if (bounds && bounds.length) {
          const [x, , low, high] = bounds[0];
          svg.append(draw("line", { stroke: colour(runs[line.run]), x1: left(x), x2: left(x), y1: top(low), y2: top(high) }));
        }
        svg.append(draw("path", { class: "curve", stroke: colour(runs[line.run]), "stroke-dasharray": DASH[line.kind], d: path(whole, top) }));
        if (whole.length <= 12 && line.kind === "now")
          for (const p of whole) svg.append(draw("circle", { r: 2.6, cx: left(p[0]), cy: top(p[1]), fill: colour(runs[line.run]) }));
      }
      cross = draw("line", { class: "cross", y1: T, y2: H - B, visibility: "hidden" });
      svg.append(cross);
    }
    const path = (points, top) => points.map((p, i) => `${i ? "L" : "M"}${left(p[0]).toFixed(1)} ${top(p[1]).toFixed(1)}`).join("");

    function read(at) {
      if (!xs.length) return;
      place = Math.max(0, Math.min(xs.length - 1, at));
      const x = xs[place];
      cross.setAttribute("x1", left(x));
      cross.setAttribute("x2", left(x));
      cross.setAttribute("visibility", "visible");
      said.replaceChildren(make("span", { text: `${about.x} ${x.toLocaleString("en")}:` }));
      for (const line of lines) {
        const i = line.x.indexOf(x);
        if (i < 0 || line.y[i] === null) continue;
        const swatch = make("span", { kind: "swatch" });
        swatch.style.background = colour(runs[line.run]);
        const bounds = line.low && line.low[i] !== null ? ` [${number(line.low[i])}, ${number(line.high[i])}]` : "";
        const kind = line.kind === "now" ? "" : ` ${line.kind}`;
        said.append(make("span", {}, swatch, `${runs[line.run].label}${kind} ${number(line.y[i])}${unit}${bounds}`));
      }
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width;
      let best = 0;
      xs.forEach((one, i) => { if (Math.abs(left(one) - x) < Math.abs(left(xs[best]) - x)) best = i; });
      if (best !== place) read(best);
    });
    svg.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: xs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      read(to);
    });
    table.addEventListener("toggle", () => {
      if (!table.open || table.children.length > 1) return;
      const heads = about.lines.map((line) => runs[line.run].label + (line.kind === "now" ? "" : `, ${line.kind}`));
      const all = [...new Set(about.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      const body = make("tbody", {}, ...all.map((x) => make("tr", {}, make("th", { scope: "row", text: String(x) }), ...about.lines.map((line) => {
        const i = line.x.indexOf(x);
        return make("td", { text: i < 0 ? "" : number(line.y[i]) });
      }))));
      table.append(make("div", { kind: "wide" }, make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col", text: about.x }), ...heads.map((text) => make("th", { scope: "col", text })))), body)));
    });
    paint();
    return { figure, paint };
  }

  function curves(content) {
    const section = $("curves"), shown = content.runs.map(() => true), panels = [];
    if (!content.groups.length) return;
    const chosen = make("fieldset", {}, make("legend", { text: "Runs" }));
    content.runs.forEach((run, i) => {
      const box = make("input", { type: "checkbox", checked: true }), swatch = make("span", { kind: "swatch" });
      swatch.style.background = colour(run);
      box.addEventListener("change", () => { shown[i] = box.checked; panels.forEach((one) => one.paint()); });
      chosen.append(make("label", {}, box, swatch, run.label));
    });
    const kinds = make("p", { kind: "note" }, "Solid: all edits made so far, tested now; the shade is the 95 % interval. Dashed: the same edits, each tested right after its own step. Dotted: the unedited model on the same prompts.");
    section.append(...(content.runs.length > 1 ? [chosen] : []), kinds);
    for (const group of content.groups) {
      const grid = make("div", { kind: "panels" });
      for (const about of group.panels) {
        const one = panel(about, content.runs, shown);
        panels.push(one);
        grid.append(one.figure);
      }
      section.append(make("h3", { text: group.title, id: `curves-${group.id}` }), grid);
    }
    section.hidden = false;
  }

  // Forgetting

  function heat(one, run, metric) {
    const points = one.points, cells = one.cells[metric], dense = points.length > 16;
    const told = (i) => !dense || i % Math.ceil(points.length / 8) === 0 || i === points.length - 1;
    const head = make("tr", {}, make("th", { scope: "col", text: dense ? "" : "made up to" }), ...points.map((p, i) => make("th", { scope: "col", text: String(p), kind: told(i) ? "told" : "" })));
    const body = cells.map((row, i) => make("tr", {}, make("th", { scope: "row", text: String(points[i]), kind: told(i) ? "told" : "" }), ...row.map((value, j) => {
      if (value === null) return make("td", {});
      const cell = make("td", { kind: value > 78 ? "cell deep" : "cell", text: value.toFixed(0), title: `made up to ${points[i]}, tested after ${points[j]}: ${value.toFixed(1)} %` });
      cell.style.setProperty("--v", value);
      return cell;
    })));
    const table = make("table", { kind: dense ? "heat dense" : "heat" }, make("caption", { text: `${run.label}: ${metric} (%)` }), make("thead", {}, head), make("tbody", {}, ...body));
    return make("figure", {}, make("div", { kind: "wide", role: "region", tabindex: "0", "aria-label": `forgetting, ${run.label}` }, table));
  }

  function forgetting(content) {
    const all = content.forgetting.filter((one) => Object.keys(one.cells).length);
    if (!all.length) return;
    const section = $("forgetting"), metrics = [...new Set(all.flatMap((one) => Object.keys(one.cells)))];
    const choice = make("select", {}, ...metrics.map((text) => make("option", { text })));
    const heats = make("div", { kind: "heats" });
    const paint = () => heats.replaceChildren(...all.filter((one) => one.cells[choice.value]).map((one) => heat(one, content.runs[one.run], choice.value)));
    choice.addEventListener("change", paint);
    section.append(make("p", { kind: "note", text: "A row: the edits made up to there, from the row above on; a column: tested after so many edits. A row that fades is forgetting; a column that fades downwards is edits that no longer take." }),
      make("div", { kind: "tools" }, make("label", {}, "Figure", choice)), heats);
    paint();
    section.hidden = false;
  }

  // Edits

  function table(content) {
    const { facts, edits, runs, unit } = content, several = runs.length > 1;
    if (!facts.id.length) return;
    const section = $("edits");
    const spelled = (value) => value === null || value === undefined ? "" : value === 0 ? "<.0001" : (value / unit).toFixed(value < unit / 100 ? 4 : 3).replace(/^0/, "");
    const share = (value) => value === null || value === undefined ? "" : `${+(100 * value / unit).toFixed(1)} %`;
    const at = (run, name, i) => run[name] ? run[name][i] : null;
    const words = facts.id.map((id, i) => [id, facts.sentence[i], facts.new[i], facts.old[i]].filter(Boolean).join("\n").toLowerCase());

    // The more probable of the two answers, with its probability.
    function answer(run, i, when) {
      const neu = at(run, `new_${when}`, i), old = at(run, `old_${when}`, i), fact = run.fact[i];
      if (neu === null) return null;
      const wins = old === null || neu > old;
      const text = (wins ? facts.new : facts.old)[fact] || (wins ? "the new answer" : "the old answer");
      return { wins: old === null ? neu * 2 > unit : wins, text: old === null && neu * 2 <= unit ? `not ${text}` : text, p: wins ? neu : old };
    }
    function told(run, i, when) {
      const one = answer(run, i, when);
      if (!one) return make("td", { kind: "text" });
      return make("td", { kind: "text" }, make("span", { kind: when === "before" ? "" : one.wins ? "kept" : "lost", text: one.text }), ` ${spelled(one.p)}`);
    }
    const p = (name) => ({ value: (run, i) => at(run, name, i), cell: (run, i) => make("td", { text: spelled(at(run, name, i)) }) });
    const s = (name) => ({ value: (run, i) => at(run, name, i), cell: (run, i) => make("td", { text: share(at(run, name, i)) }) });
    const text = (name, kind = "text") => ({ text: true, value: (run, i) => facts[name][run.fact[i]] || "", cell: (run, i) => make("td", { kind, text: facts[name][run.fact[i]] || "" }) });
    const mark = (run, i) => [at(run, "undone", i) ? "undone" : "", at(run, "lost", i) ? "did not arrive" : ""].filter(Boolean).join(", ");
    const COLUMNS = [
      { head: "edit", has: "fact", value: (run, i) => i, cell: (run, i) => make("td", { kind: "place", text: String(i + 1), title: facts.id[run.fact[i]] }) },
      { head: "id", only: !facts.sentence.some(Boolean), ...text("id") },
      { head: "fact", only: facts.sentence.some(Boolean), ...text("sentence", "text fact") },
      { head: "new answer", only: facts.new.some(Boolean), ...text("new") },
      { head: "answer before", has: "new_before", text: true, value: (run, i) => (answer(run, i, "before") || {}).text || "", cell: (run, i) => told(run, i, "before") },
      { head: "answer now", has: "new_now", text: true, value: (run, i) => (answer(run, i, "now") || {}).text || "", cell: (run, i) => told(run, i, "now") },
      { head: "misspelt as", has: "misspelt", text: true, value: (run, i) => at(run, "misspelt", i) || "", cell: (run, i) => make("td", { kind: "text", text: at(run, "misspelt", i) || "" }) },
      { head: "mark", text: true, value: mark, cell: (run, i) => { const found = mark(run, i); return make("td", { kind: "text" }, found ? make("span", { kind: "mark", text: found }) : null); } },
      { head: "p(new) before", has: "new_before", ...p("new_before") },
      { head: "p(new) found by the search", has: "searched", ...p("searched") },
      { head: "p(new) right after", has: "written", ...p("written") },
      { head: "p(new) now", has: "new_now", ...p("new_now"), worst: true },
      { head: "p(old) now", has: "old_now", ...p("old_now") },
      { head: "greedy answer now", has: "greedy", ...s("greedy") },
      { head: "paraphrases", has: "paraphrase", ...s("paraphrase") },
      { head: "neighbours", has: "specificity", ...s("specificity") },
    ];
    const FILTERS = {
      "all edits": () => true,
      "did not arrive": (run, i) => at(run, "lost", i) === 1,
      "new answer lost since": (run, i) => (at(run, "written", i) || 0) * 2 >= unit && at(run, "new_now", i) !== null && at(run, "new_now", i) * 2 < at(run, "written", i),
      "old answer is more probable now": (run, i) => { const one = answer(run, i, "now"); return one !== null && !one.wins; },
    };

    // Several runs: p(new) now of each, edit by edit.
    const where = edits.map((run) => new Map(run.fact.map((fact, i) => [fact, i])));
    const beside = { fact: facts.id.map((_, i) => i) };
    const besideColumns = [COLUMNS[0], COLUMNS[1], COLUMNS[2], COLUMNS[3], ...edits.map((run, r) => ({
      head: `p(new) now, ${runs[r].label}`, has: "fact", worst: r === 0,
      value: (_, i) => { const j = where[r].get(i); return j === undefined ? null : at(run, "new_now", j); },
      cell: (_, i) => {
        const j = where[r].get(i), value = j === undefined ? null : at(run, "new_now", j);
        const one = j === undefined ? null : answer(run, j, "now");
        return make("td", {}, make("span", { kind: one && !one.wins ? "lost" : "", text: spelled(value) }), j !== undefined && mark(run, j) ? make("small", {}, make("span", { kind: "mark", text: mark(run, j) })) : null);
      },
    }))];

    const which = make("select", { id: "which" }, ...runs.map((run, i) => make("option", { value: String(i), text: run.label })), ...(several ? [make("option", { value: "all", text: "all, side by side" })] : []));
    const search = make("input", { type: "search", id: "search", placeholder: "words of a fact, an answer, an id" });
    const filter = make("select", { id: "filter" }, ...Object.keys(FILTERS).map((text) => make("option", { text })));
    const count = make("p", { id: "count", role: "status" });
    const body = make("tbody", {}), head = make("tr", {}), rows = make("table", { id: "rows" }, make("caption", { text: "The worst first: by p(new) now. Of two answers the more probable one is told, with its probability per token (geometric mean)." }), make("thead", {}, head), body);
    const more = make("button", { type: "button", kind: "more", text: "more rows" });
    const box = make("div", { kind: "table wide", role: "region", "aria-label": "edits", tabindex: "0" }, rows, more);
    let columns, run, order = [], drawn = 0, by = null, down = false;

    function shape() {
      const all = which.value === "all";
      run = all ? beside : edits[+which.value];
      filter.disabled = all;
      columns = (all ? besideColumns : COLUMNS).filter((one) => one.only !== false && (!one.has || run[one.has]));
      by = columns.findIndex((one) => one.worst);
      if (by < 0) by = columns.findIndex((one) => one.head === "p(new) right after");
      if (by < 0) by = 0;
      down = false;
      head.replaceChildren(...columns.map((one, i) => {
        const button = make("button", { type: "button", text: one.head });
        button.addEventListener("click", () => { down = by === i && !down; by = i; fill(); });
        return make("th", { scope: "col", kind: one.text ? "text" : "" }, button);
      }));
      fill();
    }
    function fill() {
      const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean), keep = which.value === "all" ? () => true : FILTERS[filter.value];
      const one = columns[by];
      order = [];
      run.fact.forEach((fact, i) => { if (asked.every((word) => words[fact].includes(word)) && keep(run, i)) order.push(i); });
      const values = new Map(order.map((i) => [i, one.value(run, i)])), sign = down ? -1 : 1;
      const lacks = (v) => v === null || v === undefined || v === "";
      order.sort((a, b) => {
        const x = values.get(a), y = values.get(b);
        if (lacks(x) || lacks(y)) return lacks(x) - lacks(y) || a - b;
        return (x < y ? -sign : x > y ? sign : 0) || a - b;
      });
      [...head.children].forEach((th, i) => i === by ? th.setAttribute("aria-sort", down ? "descending" : "ascending") : th.removeAttribute("aria-sort"));
      body.replaceChildren();
      drawn = 0;
      rows.setAttribute("aria-rowcount", String(order.length + 1));
      count.textContent = `${order.length.toLocaleString("en")} of ${run.fact.length.toLocaleString("en")} edits`;
      box.scrollTop = 0;
      add();
    }
    function add() {
      const part = order.slice(drawn, drawn + SHOWN);
      body.append(...part.map((i, k) => make("tr", { "aria-rowindex": String(drawn + k + 2) }, ...columns.map((one) => one.cell(run, i)))));
      drawn += part.length;
      more.hidden = drawn >= order.length;
    }
    which.addEventListener("change", shape);
    search.addEventListener("input", fill);
    filter.addEventListener("change", fill);
    more.addEventListener("click", add);
    if ("IntersectionObserver" in window) new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting) && !more.hidden) add(); }, { root: box, rootMargin: "200px" }).observe(more);
    const unnamed = facts.sentence.some(Boolean) ? null : make("p", { kind: "note", text: "Only the ids of these edits are stored; d4s report --edits FILE tells them in words." });
    section.append(...[unnamed, make("div", { kind: "tools" }, several ? make("label", {}, "Run", which) : null, make("label", {}, "Search", search), make("label", {}, "Show", filter), count), box].filter(Boolean));
    section.querySelectorAll(".tools").forEach((tools) => tools.normalize());
    shape();
    section.hidden = false;
  }

  async function begin() {
    theme();
    try {
      if (!("DecompressionStream" in window)) throw new Error("this browser is too old to unpack it (Chromium 80, Firefox 113 or Safari 16.4 can)");
      const content = await unpack($("content").textContent);
      curves(content);
      forgetting(content);
      table(content);
      document.documentElement.dataset.drawn = "yes";
    } catch (error) {
      $("failed").textContent = `The figures cannot be drawn: ${error.message}`;
      $("failed").hidden = false;
      throw error;
    }
  }
  begin();
})();
