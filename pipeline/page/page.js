"use strict";
// What a camera shows comes as one JPEG, the source on the left and the restored frame on the
// right: both halves are of the same frame however late they arrive.

const SECONDS = 120; // of history in the charts
const PICTURE_MS = 100; // at most ten pictures a second
const FIGURES_MS = 1000;
const byId = (id) => document.getElementById(id);

const history = new Map(); // camera → newest last: {fps, p50, p99, drops}
let chosen = null;

function place(share) {
  const at = Math.min(1, Math.max(0, share));
  byId("picture").style.setProperty("--at", `${100 * at}%`);
  byId("divider").setAttribute("aria-valuenow", Math.round(100 * at));
}

function divider() {
  const picture = byId("picture"), handle = byId("divider");
  const follow = (event) => {
    const box = picture.getBoundingClientRect();
    place((event.clientX - box.left) / box.width);
  };
  picture.addEventListener("pointerdown", (event) => {
    picture.setPointerCapture(event.pointerId);
    follow(event);
  });
  picture.addEventListener("pointermove", (event) => {
    if (picture.hasPointerCapture(event.pointerId)) follow(event);
  });
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
    if (step) place((Number(handle.getAttribute("aria-valuenow")) + step) / 100);
  });
}

function paint(bitmap) {
  const width = bitmap.width / 2, height = bitmap.height;
  ["before", "after"].forEach((side, n) => {
    const canvas = byId(side);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    canvas.getContext("2d").drawImage(bitmap, n * width, 0, width, height, 0, 0, width, height);
  });
  byId("waiting").hidden = true;
}

async function pictures() {
  for (;;) {
    const began = performance.now();
    try {
      if (chosen !== null && !document.hidden) {
        const asked = chosen;
        const answer = await fetch(`cameras/${encodeURIComponent(asked)}/pair.jpg`);
        if (answer.status === 200) {
          const bitmap = await createImageBitmap(await answer.blob());
          if (asked === chosen) paint(bitmap); // else another was chosen meanwhile
          bitmap.close();
        } else {
          byId("waiting").hidden = false;
        }
      }
    } catch {
      byId("waiting").hidden = false; // the server is away: asked again below
    }
    const rest = PICTURE_MS - (performance.now() - began);
    await new Promise((done) => setTimeout(done, Math.max(20, rest)));
  }
}

function choose(name) {
  if (name !== chosen) for (const side of ["before", "after"]) byId(side).width = 0;
  chosen = name;
  byId("waiting").hidden = false;
}

function buttons(cameras) {
  const nav = byId("cameras");
  const wanted = cameras.map((camera) => camera.name);
  const shown = [...nav.children].map((button) => button.textContent);
  if (wanted.join("\n") !== shown.join("\n")) {
    nav.replaceChildren(...wanted.map((name) => {
      const button = document.createElement("button");
      button.textContent = name;
      button.addEventListener("click", () => { choose(name); show(cameras); });
      return button;
    }));
  }
  cameras.forEach((camera, n) => {
    nav.children[n].dataset.state = camera.state;
    nav.children[n].title = camera.state;
    nav.children[n].setAttribute("aria-pressed", camera.name === chosen);
  });
}

function figures(camera) {
  const rows = [
    ["state", camera.state], ["frames in", camera.frames_in], ["frames out", camera.frames_out],
    ["dropped", camera.dropped], ["unrestored", camera.bypassed], ["repeated", camera.repeated],
    ["reconnects", camera.reconnects],
  ];
  byId("figures").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div"), dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    row.append(dt, dd);
    return row;
  }));
}

function chart(id, series) {
  const canvas = byId(id), scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth * scale, height = canvas.clientHeight * scale;
  if (!width) return;
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  const top = Math.max(1e-9, ...series.flatMap((line) => line.values)) * 1.1;
  for (const { values, colour } of series) {
    pen.beginPath();
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5 * scale;
    values.forEach((value, n) => {
      const x = width * (1 - (values.length - 1 - n) / (SECONDS - 1));
      const y = height - 2 * scale - (value / top) * (height - 4 * scale);
      if (n) pen.lineTo(x, y); else pen.moveTo(x, y);
    });
    pen.stroke();
  }
}

function remember(camera, seconds) {
  const known = history.get(camera.name) ?? { points: [], dropped: camera.dropped };
  const drops = Math.max(0, camera.dropped - known.dropped) / seconds;
  known.dropped = camera.dropped;
  known.points.push({ fps: camera.fps, p50: camera.latency_ms.p50, p99: camera.latency_ms.p99, drops });
  known.points.splice(0, Math.max(0, known.points.length - SECONDS));
  history.set(camera.name, known);
}

function show(cameras) {
  if (!cameras.some((camera) => camera.name === chosen)) choose(cameras[0]?.name ?? null);
  buttons(cameras);
  const camera = cameras.find((each) => each.name === chosen);
  if (!camera) return;
  figures(camera);
  const points = history.get(camera.name)?.points ?? [];
  const line = (key) => points.map((point) => point[key]);
  chart("chart-fps", [{ values: line("fps"), colour: "#6fc3df" }]);
  chart("chart-latency", [{ values: line("p99"), colour: "#e0a458" }, { values: line("p50"), colour: "#6fc3df" }]);
  chart("chart-drops", [{ values: line("drops"), colour: "#e06c75" }]);
  const last = points.at(-1);
  if (!last) return;
  byId("now-fps").textContent = last.fps.toFixed(1);
  byId("now-latency").textContent = `${last.p50.toFixed(0)}, ${last.p99.toFixed(0)}`;
  byId("now-drops").textContent = last.drops.toFixed(1);
}

async function numbers() {
  let before = performance.now() - FIGURES_MS;
  for (;;) {
    try {
      const cameras = await (await fetch("cameras")).json();
      const now = performance.now();
      cameras.forEach((camera) => remember(camera, (now - before) / 1000));
      before = now;
      show(cameras);
    } catch {
      for (const button of byId("cameras").children) button.dataset.state = "away";
    }
    await new Promise((done) => setTimeout(done, FIGURES_MS));
  }
}

divider();
pictures();
numbers();
