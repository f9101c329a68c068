// Draws the flame graph of flamegraph.html, which flamegraph.py puts this into.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const ROW_PX = 22, LEAST_PX = 0.4, LEAST_TEXT_PX = 36, N_COLOURS = 9;

  // --- the value that is shown: columns by node, each behind the one above it ---
  let view, nNodes, above, frameOf, weight, value, own, depth, start, end;
  function layOut() {
    nNodes = view.nodes.length / 5;
    const column = (at) => Array.from({ length: nNodes }, (_, i) => view.nodes[5 * i + at]);
    [depth, frameOf, weight, value, own] = [0, 1, 2, 3, 4].map(column);
    const newest = [];  // node of each depth
    above = depth.map((rows, i) => {
      newest[rows] = i;
      return rows ? newest[rows - 1] : -1;
    });
    start = new Array(nNodes).fill(0);
    end = Array.from({ length: nNodes }, (_, i) => i + 1);  // of the nodes below
    const next = new Array(nNodes).fill(0);  // where the next one below it starts
    for (let i = 1; i < nNodes; i++) {
      next[i] = start[i] = next[above[i]];
      next[above[i]] += weight[i];
    }
    for (let i = nNodes - 1; i > 0; i--) end[above[i]] = Math.max(end[above[i]], end[i]);
  }

  // --- texts ---
  const STEPS_OF_UNIT = {
    bytes: [["B", 1], ["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30], ["TiB", 2 ** 40]],
    nanoseconds: [["ns", 1], ["µs", 1e3], ["ms", 1e6], ["s", 1e9]],
  };
  const grouped = new Intl.NumberFormat("en");
  const counted = (n, noun) => `${grouped.format(n)} ${noun}${n === 1 ? "" : "s"}`;
  function sized(number, unit = view.unit) {
    const size = Math.abs(number);
    if (!size) return "0";
    if (!Object.hasOwn(STEPS_OF_UNIT, unit)) {
      return grouped.format(size) + (unit === "count" ? "" : ` ${unit}`);
    }
    const steps = STEPS_OF_UNIT[unit];
    const [name, step] = steps.findLast(([, least]) => size >= least) ?? steps[0];
    const scaled = size / step;
    const isWhole = step === 1 || scaled >= 100;
    const nDecimals = scaled >= 10 ? 1 : 2;
    const digits = isWhole ? grouped.format(Math.round(scaled)) : scaled.toFixed(nDecimals);
    return `${digits} ${name}`;
  }
  function signed(number) {
    const sign = number < 0 ? "−" : data.isDifference && number > 0 ? "+" : "";
    return sign + sized(number);
  }
  const percent = (part) => `${(100 * part / weight[0]).toFixed(1)} %`;
  const nameOf = (i) => {
    if (i) return data.frames[frameOf[i]][0] || "(no name)";
    return data.isDifference ? "all that changed" : "all";
  };
  const placeOf = (i) => i ? data.frames[frameOf[i]][1] : "";
  function figures(i) {
    if (data.isDifference) {
      return `${signed(value[i])}, of its own ${signed(own[i])}; ${percent(weight[i])} of all ` +
        "that changed, up and down together";
    }
    return `${signed(value[i])}, ${percent(weight[i])} of all; of its own ${signed(own[i])}, ` +
      percent(Math.abs(own[i]));
  }
  const shortened = (place) => place.split("/").slice(-3).join("/");
  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }
  function button(text, act) {
    const made = element("button", "", text);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  }
  function colour(i) {
    if (!data.isDifference) {
      if (!i) return "module module-rest";
      const module = data.frames[frameOf[i]][2];
      return `module module-${module < N_COLOURS ? module : "rest"}`;
    }
    const balance = Math.round(3 * value[i] / weight[i]);
    return `${balance > 0 ? "more" : "less"} change-${Math.abs(balance)}`;
  }

  // --- the graph ---
  let zoomed = 0, current = 0, query = "";
  let shown = new Map();  // elements by node
  let isFound = data.frames.map(() => false);
  const graph = byId("graph");

  function paint(made, i) {
    const found = query && i && isFound[frameOf[i]];
    const isQuiet = query || i < zoomed;
    made.className = `frame ${found ? "found" : isQuiet ? "quiet" : colour(i)}`;
  }

  function frameElement(i, left, width, widthPx) {
    const made = element("div");
    paint(made, i);
    made.style.left = `${100 * left}%`;
    made.style.width = `max(${100 * width}% - 1px, 1px)`;
    made.style.top = `${ROW_PX * depth[i]}px`;
    made.dataset.node = i;
    made.tabIndex = i === current ? 0 : -1;
    made.setAttribute("role", "treeitem");
    made.setAttribute("aria-level", depth[i] + 1);
    made.setAttribute("aria-label", `${nameOf(i)} ${placeOf(i)}: ${figures(i)}`);
    if (widthPx < LEAST_TEXT_PX) {
      made.style.padding = "0";
      return made;
    }
    made.append(element("span", "", nameOf(i)));
    const amount = data.isDifference || !i ? signed(value[i]) : "";
    const file = placeOf(i).split("/").pop();
    const rest = [amount, file].filter(Boolean).join("  ");
    if (rest) made.append(element("span", "place", `  ${rest}`));
    return made;
  }

  function draw() {
    const hadFocus = graph.contains(document.activeElement);
    const elements = new Map();
    let deepest = 0;
    for (let i = 0; i < nNodes; i++) {
      const isAbove = i <= zoomed && zoomed < end[i];
      const width = isAbove ? 1 : weight[i] / weight[zoomed];
      const isInside = isAbove || (i > zoomed && i < end[zoomed]);
      if (!isInside || width * graph.clientWidth < LEAST_PX) {
        i = end[i] - 1;  // nor is anything below it
        continue;
      }
      const left = isAbove ? 0 : (start[i] - start[zoomed]) / weight[zoomed];
      elements.set(i, frameElement(i, left, width, width * graph.clientWidth));
      deepest = Math.max(deepest, depth[i]);
    }
    if (!elements.has(current)) {
      current = zoomed;
      elements.get(current).tabIndex = 0;
    }
    shown = elements;
    graph.replaceChildren(...elements.values());
    graph.style.height = `${ROW_PX * (deepest + 1)}px`;
    byId("reset").disabled = zoomed === 0;
    if (hadFocus) shown.get(current).focus({ preventScroll: true });
  }

  function zoom(i) {
    zoomed = current = i;
    draw();
    describe(i);
  }

  function move(i) {
    if (!shown.has(i)) return;
    shown.get(current).tabIndex = -1;
    current = i;
    shown.get(i).tabIndex = 0;
    shown.get(i).focus();
  }

  function beside(i, step) {
    let other = i + step;
    while (other > 0 && other < nNodes && !(depth[other] === depth[i] && shown.has(other))) {
      other += step;
    }
    return other;
  }

  function describe(i) {
    const name = element("p");
    name.append(element("strong", "", nameOf(i)), element("span", "dim", `  ${placeOf(i)}`));
    byId("details").replaceChildren(name, element("p", "", figures(i)));
  }

  function search(text) {
    query = text.trim().toLowerCase();
    isFound = data.frames.map(([name, place]) => `${name} ${place}`.toLowerCase().includes(query));
    let nFound = 0, foundWeight = 0, reached = 0;  // counted up to here
    for (let i = 1; query && i < nNodes; i++) {
      if (!isFound[frameOf[i]]) continue;
      nFound++;
      if (i < reached) continue;  // below one that is found
      foundWeight += weight[i];
      reached = end[i];
    }
    byId("matches").textContent = !query ? "" : nFound
      ? `${grouped.format(nFound)} found, ${percent(foundWeight)} of all`
      : "nothing found";
    shown.forEach(paint);
  }

  function searchFor(text) {
    byId("search").value = text;
    search(text);
  }

  // --- around it ---
  function subtitle() {
    byId("subtitle").textContent = `${view.name} in ${view.unit}, ` +
      `${counted(view.nStacks, "stack")}, ${signed(value[0])} in all`;
    byId("left-out").hidden = !view.nLeftOut;
    byId("left-out").textContent = `Left out: ${counted(view.nLeftOut, "call")} with less than ` +
      `${100 * data.leastShare} % of all, and what is below.`;
  }

  function hottest() {
    byId("hottest").replaceChildren();
    byId("hottest-title").textContent = data.isDifference
      ? "Lines that changed most" : "Hottest lines, by what is their own";
    for (const [name, place, amount] of view.hottest) {
      const row = element("tr");
      const cell = element("td");
      cell.append(button(name || "(no name)", () => searchFor(`${name} ${place}`)));
      const where = element("td", "place", shortened(place));
      where.title = place;
      row.append(
        element("td", "number", signed(amount)),
        element("td", "number", percent(Math.abs(amount))),
        cell,
        where,
      );
      byId("hottest").append(row);
    }
  }

  function legend() {
    const list = byId("legend").querySelector("ul");
    list.replaceChildren();
    const add = (className, text, share) => {
      const item = element("li");
      item.append(element("span", `swatch ${className}`), element("span", "", text));
      if (share !== undefined) item.append(element("span", "share dim", percent(share)));
      list.append(item);
    };
    if (data.isDifference) {
      byId("legend-title").textContent = "Width: what changed, up and down together";
      list.style.columns = 1;
      add("more change-3", "more than before");
      add("less change-3", "less than before");
      add("change-0", "below it, as much more as less");
      return;
    }
    byId("legend-title").textContent = "Colours, by module, with what is their own";
    const modules = data.modules.map((name, number) => [view.shares[number], name, number]);
    modules.sort(([one], [other]) => other - one);  // colours are the same for all values
    for (const [share, name, number] of modules) {
      if (share && number < N_COLOURS) add(`module module-${number}`, name, share);
    }
    const rest = modules.filter(([, , number]) => number >= N_COLOURS);
    const restShare = rest.reduce((sum, [share]) => sum + share, 0);
    if (rest.length) add("module module-rest", `${rest.length} others`, restShare);
    list.style.columns = list.children.length < 6 ? 1 : "";
  }

  function nothing() {
    byId("nothing").hidden = false;
    const sampling = data.period ? ` (one in ${sized(data.period, data.periodUnit)})` : "";
    byId("nothing").textContent = data.isDifference
      ? "Nothing changed: both profiles count the same at each stack."
      : "Nothing was counted. Either nothing of the kind happened in this time, or too little " +
        `for the sampling${sampling} to notice: profile for longer, or sample more often.`;
  }

  function show(number) {
    const path = [];  // frames, the outermost last
    for (let i = zoomed; i > 0; i = above[i]) path.push(frameOf[i]);
    view = data.views[number];
    layOut();
    zoomed = 0;
    for (let i = 1; path.length && i < nNodes; i++) {  // the same call, or as near as there is
      if (above[i] !== zoomed || frameOf[i] !== path.at(-1)) continue;
      zoomed = i;
      path.pop();
    }
    [...byId("values").children].forEach((each, at) => {
      each.setAttribute("aria-pressed", at === number);
    });
    subtitle();
    hottest();
    legend();
    zoom(zoomed);
    search(query);
  }

  if (!data.views[data.first].nStacks) {
    nothing();
    return;
  }
  byId("shown").hidden = false;
  byId("values").hidden = data.views.length === 1;
  data.views.forEach(({ name, nStacks }, number) => {
    const made = button(name, () => show(number));
    made.disabled = !nStacks;
    byId("values").append(made, " ");
  });
  show(data.first);

  const nodeAt = (event) => {
    const found = event.target.closest(".frame");
    return found ? Number(found.dataset.node) : -1;
  };
  graph.addEventListener("click", (event) => {
    if (nodeAt(event) >= 0) zoom(nodeAt(event));
  });
  for (const kind of ["mouseover", "focusin"]) {
    graph.addEventListener(kind, (event) => {
      if (nodeAt(event) >= 0) describe(nodeAt(event));
    });
  }
  graph.addEventListener("keydown", (event) => {
    const act = {
      ArrowDown: () => move(current + 1 < end[current] ? current + 1 : current),
      ArrowUp: () => move(current ? above[current] : 0),
      ArrowLeft: () => move(beside(current, -1)),
      ArrowRight: () => move(beside(current, 1)),
      Home: () => move(0),
      Enter: () => zoom(current),
      " ": () => zoom(current),
    }[event.key];
    if (!act || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (query) searchFor("");
    else zoom(0);
  });
  byId("search").addEventListener("input", (event) => search(event.target.value));
  byId("reset").addEventListener("click", () => zoom(0));
  window.addEventListener("resize", draw);
})();
