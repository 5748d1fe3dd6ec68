// Draws the charts of a report from the JSON in the page, and makes its tables searchable and sortable.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const short = (value) => Math.abs(value) >= 1000 ? d3.format(".3s")(value) : d3.format(".4~g")(value);

  function draw(id, make) {
    const place = document.getElementById(id);
    if (!place) return;
    let width = 0;
    const render = () => {
      if (place.clientWidth === width || !place.clientWidth) return;
      width = place.clientWidth;
      place.replaceChildren(make(width));
    };
    render();
    new ResizeObserver(() => requestAnimationFrame(render)).observe(place);
  }

  const common = (width, height) => ({
    width, height, marginLeft: 56, marginBottom: 40, marginTop: 28, inset: 4, style: { fontSize: "12px" },
  });
  const depth = { label: "groups in the order of the network →", tickFormat: (i) => Number.isInteger(i) ? `${i}` : "" };
  const bars = (groups, value, fill, title) => Plot.rectY(groups, {
    x1: (g) => g.at - 0.4, x2: (g) => g.at + 0.4, y: value, fill, title,
  });
  const tip = (groups, value, title) => Plot.tip(groups, Plot.pointerX({
    x: "at", y: value, title, fill: "var(--ground)", stroke: "var(--faint)",
  }));
  const named = (group) => group.layer + (group.layer === group.name ? "" : `\n${group.name}`);

  function widths(width) {
    const title = (g) => `${named(g)}\n${g.size} → ${g.kept} channels`;
    return Plot.plot({
      ...common(width, 260), x: depth, y: { label: "channels", grid: true },
      marks: [
        bars(data.groups, "size", "var(--before)"), bars(data.groups, "kept", "var(--after)"), Plot.ruleY([0]),
        tip(data.groups, "size", title),
      ],
    });
  }

  function shares(width) {
    const title = (g) => `${named(g)}\n${percent(g.macs)} of the MACs\n${percent(g.params)} of the parameters`;
    return Plot.plot({
      ...common(width, 260), x: depth,
      y: { label: "parameters ↓   MACs ↑", grid: true, tickFormat: (v) => `${d3.format(".3~g")(Math.abs(100 * v))} %` },
      marks: [
        bars(data.groups, "macs", "var(--after)"), bars(data.groups, (g) => -g.params, "var(--accent)"), Plot.ruleY([0]),
        tip(data.groups, "macs", title),
      ],
    });
  }

  function losses(width) {
    const known = data.groups.filter((g) => g.loss > 0);
    const title = (g) => `${named(g)}\nloss ${short(g.loss)}\n${g.size} → ${g.kept} channels`;
    return Plot.plot({
      ...common(width, 220), x: depth, y: { label: "estimated loss", type: "log", grid: true, ticks: 5, tickFormat: "~g" },
      r: { range: [2, 8] },
      marks: [
        Plot.dot(known, { x: "at", y: "loss", r: (g) => 1 - g.kept / g.size, fill: "var(--after)", fillOpacity: 0.7 }),
        tip(known, "loss", title),
      ],
    });
  }

  function tradeoffs(width) {
    const gone = (g, kept) => 1 - kept / g.size;
    const groups = d3.sort(data.groups, (g) => -(g.loss ?? 0)).slice(0, 100); // more would be a tangle
    const points = groups.flatMap((g) => g.curve
      .filter(([, loss]) => loss > 0).map(([kept, loss]) => ({ group: g, gone: gone(g, kept), kept, loss })));
    const chosen = groups.filter((g) => g.loss > 0)
      .map((g) => ({ group: g, gone: gone(g, g.kept), kept: g.kept, loss: g.loss }));
    const title = (p) => `${named(p.group)}\n${p.group.size} → ${p.kept} channels\nloss ${short(p.loss)}`;
    return Plot.plot({
      ...common(width, 340), x: { label: "channels that go →", tickFormat: "%" },
      y: { label: "estimated loss", type: "log", grid: true, ticks: 5, tickFormat: "~g" },
      marks: [
        Plot.line(points, { x: "gone", y: "loss", z: (p) => p.group.name, stroke: "var(--before)", strokeOpacity: 0.7 }),
        Plot.dot(chosen, { x: "gone", y: "loss", r: 3, fill: "var(--after)" }),
        Plot.tip([...points, ...chosen], Plot.pointer({
          x: "gone", y: "loss", title, fill: "var(--ground)", stroke: "var(--faint)",
        })),
      ],
    });
  }

  function evaluations(width) {
    const [dense, ...others] = data.evaluations;
    const tried = others.sort((a, b) => a.ratio - b.ratio);
    const title = (e) => `${percent(e.ratio)} to go\n${data.metric} ${short(e.value)} ± ${short(e.noise)}`;
    return Plot.plot({
      ...common(width, 240), x: { label: "fraction to remove →", ticks: 8, tickFormat: (v) => percent(v) },
      y: { label: data.metric, grid: true },
      marks: [
        Plot.ruleY([dense.value], { stroke: "var(--before)", strokeDasharray: "4 3" }),
        Plot.line(tried, { x: "ratio", y: "value", stroke: "var(--before)" }),
        Plot.ruleX(tried, { x: "ratio", y1: (e) => e.value - e.noise, y2: (e) => e.value + e.noise, stroke: "var(--faint)" }),
        Plot.dot(tried, { x: "ratio", y: "value", r: 5, fill: (e) => e.met ? "var(--good)" : "var(--accent)" }),
        Plot.tip(tried, Plot.pointer({ x: "ratio", y: "value", title, fill: "var(--ground)", stroke: "var(--faint)" })),
      ],
      color: { type: "identity" },
    });
  }

  function pareto(width) {
    const points = data.points.filter((p) => p[data.cost] !== null && p[data.loss] !== null);
    const front = points.filter((p) => p.on_front).sort((a, b) => a[data.cost] - b[data.cost]);
    const dense = { name: "dense", [data.cost]: data.dense[data.cost], [data.loss]: 0 };
    const title = (p) => [p.name, `${data.cost} ${short(p[data.cost])}`, `${data.loss} ${short(p[data.loss])}`,
      ...(p.metric == null ? [] : [`${data.metric} ${short(p.metric)}`]), ...(p.name === data.knee ? ["knee"] : [])].join("\n");
    const several = new Set(points.map((p) => p.criterion)).size > 1;
    return Plot.plot({
      ...common(width, 380),
      x: { label: `${data.cost} →`, grid: true, tickFormat: "~s" }, y: { label: `↑ ${data.loss}`, grid: true },
      color: { legend: several, scheme: "Dark2" }, symbol: { legend: false },
      marks: [
        Plot.line([...front, dense], { x: data.cost, y: data.loss, stroke: "var(--before)", strokeWidth: 2 }),
        Plot.dot([dense], { x: data.cost, y: data.loss, r: 5, fill: "var(--before)" }),
        Plot.dot(points, {
          x: data.cost, y: data.loss, r: 6, href: "file", target: "_blank", fill: several ? "criterion" : "var(--after)",
          fillOpacity: (p) => p.on_front ? 1 : 0.4,
        }),
        Plot.dot(points.filter((p) => p.name === data.knee), {
          x: data.cost, y: data.loss, r: 11, stroke: "var(--accent)", strokeWidth: 2,
        }),
        Plot.text([dense], { x: data.cost, y: data.loss, text: ["dense"], dy: -14 }),
        Plot.tip([dense, ...points], Plot.pointer({
          x: data.cost, y: data.loss, title, fill: "var(--ground)", stroke: "var(--faint)",
        })),
      ],
    });
  }

  const byWidth = (field, label) => (width) => {
    const rows = data.rows.filter((r) => r[field] !== null);
    const title = (r) => `${named(r)}\n${r.width} of ${r.channels} channels\n${label} ${short(r[field])}`;
    return Plot.plot({
      ...common(width, 340), x: { label: "channels that go →", tickFormat: "%" }, y: { label, grid: true },
      marks: [
        Plot.line(rows, { x: "gone", y: field, z: "name", stroke: "var(--before)" }),
        Plot.dot(rows, { x: "gone", y: field, r: 3, fill: "var(--after)" }),
        Plot.tip(rows, Plot.pointer({ x: "gone", y: field, title, fill: "var(--ground)", stroke: "var(--faint)" })),
      ],
    });
  };
  const curves = byWidth("loss", "estimated loss"), changes = byWidth("change", "output error");

  function searchable(table) {
    const box = document.querySelector(`input[data-for=${table.id}]`);
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const count = document.querySelector(`[data-count=${table.id}]`);
    box?.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      if (count) count.textContent = `${shown} of ${rows.length}`;
    });
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const rising = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
        const order = numeric ? (a, b) => Number(key(a)) - Number(key(b)) : (a, b) => key(a).localeCompare(key(b));
        body.append(...[...rows].sort((a, b) => (rising ? 1 : -1) * order(a, b)));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }

  function save(figure) {
    const svg = figure.querySelector(".chart svg:last-of-type") ?? figure.querySelector("svg");
    const style = getComputedStyle(document.documentElement);
    const copy = svg.cloneNode(true);
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.style.color = style.getPropertyValue("--ink");
    copy.style.fontFamily = "sans-serif";
    const text = new XMLSerializer().serializeToString(copy).replace(/var\((--[a-z]+)\)/g, (_, name) => style.getPropertyValue(name));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    link.download = `${figure.querySelector(".chart").id}.svg`;
    link.click();
  }

  for (const [id, make] of Object.entries({ widths, shares, losses, tradeoffs, evaluations, pareto, curves, changes })) draw(id, make);
  document.querySelectorAll("table.sortable").forEach(searchable);
  document.querySelectorAll("figure > button").forEach((b) => b.addEventListener("click", () => save(b.parentElement)));
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
