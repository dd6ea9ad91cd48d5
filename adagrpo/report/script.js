// Values under the pointer: reads them back from the paths, so the page carries no second copy of the data.
(() => {
  const points = (path) =>
    [...path.getAttribute("d").matchAll(/(-?[\d.]+),(-?[\d.]+)/g)].map((m) => [Number(m[1]), Number(m[2])]);
  const say = (value) => {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };

  for (const frame of document.querySelectorAll(".frame")) {
    const curves = frame.querySelector(".curves");
    const { scale, unit } = curves.dataset;
    const [x0, x1, y0, y1] = ["x0", "x1", "y0", "y1"].map((key) => Number(curves.dataset[key]));
    const valueAt = (y) => (scale === "log" ? y0 * (y1 / y0) ** (1 - y / 1000) : y0 + (y1 - y0) * (1 - y / 1000));
    let series = null;
    const load = () =>
      [...curves.querySelectorAll(".line, .area")].map((path) => {
        const raw = [...curves.querySelectorAll(".raw")].find(
          (other) => other.dataset.key === path.dataset.key && other.dataset.run === path.dataset.run,
        );
        return { label: path.dataset.label, area: path.matches(".area"), at: points(raw ?? path) };
      });
    const nearest = (at, x) => at.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    const read = ({ area, at }, x) => {
      if (!area) {
        const [px, py] = nearest(at, x);
        return [px, valueAt(py)]; // of the nearest iteration that has a value
      }
      const upper = at.slice(0, at.length / 2);
      const i = Math.max(0, upper.findIndex((point, k) => k % 2 === 0 && x >= point[0] && x <= upper[k + 1][0]));
      return [x, valueAt(upper[i][1]) - valueAt(at[at.length - 1 - i][1])];
    };

    const cursor = document.createElement("div");
    const tip = document.createElement("div");
    cursor.className = "cursor";
    tip.className = "tip";
    const hide = () => [cursor, tip].forEach((part) => part.remove());
    const show = (event) => {
      const box = frame.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      if (share < -0.02 || share > 1.02) return hide();
      series ??= load();
      const values = series.map((one) => ({ label: one.label, value: read(one, 1000 * share) }));
      const x = values[0].value[0];
      const iteration = (at) => Math.round(x0 + ((x1 - x0) * at) / 1000);
      const rows = values.map(({ label, value: [at, y] }) => {
        const elsewhere = iteration(at) === iteration(x) ? "" : ` (at ${iteration(at)})`;
        return `${label}: ${say(y)}${unit}${elsewhere}`;
      });
      tip.replaceChildren(...[`iteration ${iteration(x)}`, ...rows].map((text) => {
        const row = document.createElement("div");
        row.textContent = text;
        return row;
      }));
      cursor.style.left = `${x / 10}%`;
      frame.append(cursor, tip);
      const left = (x / 1000) * box.width;
      tip.style.left = `${Math.max(-40, left + 12 + tip.offsetWidth > box.width ? left - 12 - tip.offsetWidth : left + 12)}px`;
    };
    frame.addEventListener("pointermove", show);
    frame.addEventListener("pointerdown", show);
    frame.addEventListener("pointerleave", hide);
  }
})();
