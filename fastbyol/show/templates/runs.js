"use strict";
// Filters and sorts the table. What is chosen stands in the address behind "#", to be kept and
// sent: q (words and conditions), sort, desc, and a value for each key that has a list of choices.
(() => {
  const table = document.getElementById("runs"), body = table.tBodies[0];
  const form = document.getElementById("filters"), words = document.getElementById("q");
  const count = document.getElementById("count");
  const columns = [...table.tHead.rows[0].cells].map((head, index) => ({
    head, index, key: head.dataset.key, isNumber: head.classList.contains("n"),
  })).filter((column) => column.key);
  const byKey = new Map(columns.map((column) => [column.key, column]));
  const rows = [...body.rows].map((row) => ({
    row, text: row.textContent.toLowerCase(),
    cells: [...row.cells].map((cell) => cell.textContent),
    exact: [...row.cells].map((cell) => cell.dataset.exact),
  }));
  const selects = new Map();

  const value = (entry, column) => {
    const text = entry.cells[column.index];
    if (!column.isNumber) return text;
    return text === "" ? NaN : Number(entry.exact[column.index] ?? text);
  };
  const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const byText = (a, b) => {
    const x = Number(a), y = Number(b);
    return a === "" || b === "" || isNaN(x) || isNaN(y) ? order(a, b) : x - y;
  };

  function condition(word) {
    const parts = /^([^=!<>]+)(==|!=|<=|>=|=|<|>)(.*)$/.exec(word);
    const column = parts && byKey.get(parts[1]);
    if (!column) {
      const part = word.toLowerCase();
      return (entry) => entry.text.includes(part);
    }
    const sign = parts[2], asked = parts[3], number = Number(asked);
    const areNumbers = column.isNumber && asked !== "" && !isNaN(number);
    return (entry) => {
      const text = entry.cells[column.index];
      const difference = areNumbers ? value(entry, column) - number : order(text || "none", asked);
      if (sign === "!=") return difference !== 0;
      if (sign === "=" || sign === "==") return difference === 0;
      if (text === "" || column.isNumber !== areNumbers) return false;
      return sign === "<" ? difference < 0 : sign === "<=" ? difference <= 0
        : sign === ">" ? difference > 0 : difference >= 0;
    };
  }

  function apply(state) {
    const tests = (state.get("q") || "").split(/\s+/).filter(Boolean).map(condition);
    for (const [key, select] of selects) {
      const asked = state.get(key), index = byKey.get(key).index;
      if (asked !== null) tests.push((entry) => entry.cells[index] === asked);
    }
    let shown = 0;
    for (const entry of rows) {
      entry.row.hidden = !tests.every((test) => test(entry));
      shown += !entry.row.hidden;
    }
    count.textContent = (shown < rows.length ? shown + " of " : "") + rows.length + " runs";
    const column = byKey.get(state.get("sort")), down = state.has("desc");
    for (const each of columns) each.head.removeAttribute("aria-sort");
    let sorted = rows;
    if (column) {
      column.head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const missing = (entry) => entry.cells[column.index] === "";
      sorted = [...rows].sort((a, b) =>
        missing(a) - missing(b)
        || (down ? -1 : 1) * order(value(a, column), value(b, column)));
    }
    body.append(...sorted.map((entry) => entry.row));
  }

  function read() {
    const state = new URLSearchParams(location.hash.slice(1));
    words.value = state.get("q") || "";
    for (const [key, select] of selects) {
      const asked = state.get(key);
      const index = asked === null ? 0 : [...select.options].findIndex((each, at) =>
        at && each.textContent === asked);
      select.selectedIndex = index;
    }
    apply(state);
  }

  function change(key, text) {
    const state = new URLSearchParams(location.hash.slice(1));
    if (text === null) state.delete(key); else state.set(key, text);
    show(state);
  }

  function show(state) {
    try {
      history.replaceState(null, "", "#" + state);
    } catch {
      location.hash = state;
    }
    apply(state);
  }

  const lists = document.createElement("div");
  for (const column of columns) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.head.textContent;
    column.head.replaceChildren(button);
    button.addEventListener("click", () => {
      const state = new URLSearchParams(location.hash.slice(1));
      const again = state.get("sort") === column.key;
      const down = again ? !state.has("desc") : "down" in column.head.dataset;
      state.set("sort", column.key);
      if (down) state.set("desc", "1"); else state.delete("desc");
      show(state);
    });
    if (!("choices" in column.head.dataset)) continue;
    const values = [...new Set(rows.map((entry) => entry.cells[column.index]))].sort(byText);
    const label = document.createElement("label"), select = document.createElement("select");
    label.append(column.key, select);
    select.append(new Option("all"), ...values.map((text) => new Option(text)));
    select.addEventListener("change", () =>
      change(column.key, select.selectedIndex ? select.selectedOptions[0].textContent : null));
    selects.set(column.key, select);
    lists.append(label);
  }
  const reset = document.createElement("button");
  reset.type = "button";
  reset.textContent = "show all";
  reset.addEventListener("click", () => { show(new URLSearchParams()); read(); });
  form.append(reset);
  if (selects.size) {
    const details = document.createElement("details"), summary = document.createElement("summary");
    summary.textContent = "state and settings that differ";
    details.open = innerWidth > 700;
    details.append(summary, lists);
    form.append(details);
  }
  words.addEventListener("input", () => change("q", words.value || null));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", read);
  form.hidden = false;
  read();
})();
