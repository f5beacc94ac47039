"use strict";

const { report, source, clips } = JSON.parse(document.getElementById("data").textContent);
const models = report.models.map((model) => model.name);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b28600", "#56b4e9", "#8a63d2", "#7f7f7f"];
const MEASURES = [
  { key: "psnr", label: "PSNR, dB", digits: 2, better: "high", missing: "∞" },
  { key: "ssim", label: "SSIM", digits: 4, better: "high" },
  { key: "ms_ssim", label: "MS-SSIM", digits: 4, better: "high" },
  { key: "lpips", label: "LPIPS", digits: 4, better: "low" },
  { key: "rfid", label: "rFID", digits: 3, better: "low" },
  { key: "rfvd", label: "rFVD", digits: 3, better: "low" },
  { key: "flicker", label: "flicker ×100", digits: 3, better: "low", scale: 100 },
  { key: "block_score", label: "blocks", digits: 3, better: "low" },
  { key: "tile_seam", label: "tile seam", digits: 3, better: "low" },
  { key: "chunk_seam", label: "chunk seam", digits: 3, better: "low" },
];
const SHOWN = MEASURES.filter(
  ({ key, missing }) => missing || report.models.some((model) => model[key].value !== null));
const PER_FILE = SHOWN.filter(({ key }) => key !== "rfid" && key !== "rfvd");

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text goes in as text, never as markup. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "rect", "circle", "text", "title", "path"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function format(value, measure) {
  if (value === null || value === undefined) return measure.missing || "–";
  return (value * (measure.scale || 1)).toFixed(measure.digits);
}

/** A value that sorts from worst to best. */
function goodness(value, measure) {
  if (value === null || value === undefined) return measure.missing ? Infinity : -Infinity;
  return measure.better === "high" ? value : -value;
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => make("option", { value }, label)));
  if (chosen !== undefined) select.value = chosen;
}

// Summary ------------------------------------------------------------------------------------------------------------

function showSummary() {
  const { frames, resolution, chunk, tile } = report.settings;
  const how = [
    frames && `the first ${frames} frames of each clip`, resolution && `cut to ${resolution[1]}×${resolution[0]}`,
    chunk && `${chunk} frames at a time`, tile && `tiles of ${tile[1]}×${tile[0]}`,
  ].filter(Boolean);
  byId("about").textContent =
    `${report.files} files, ${report.frames} frames, of ${report.input}${how.length ? `; ${how.join(", ")}` : ""}`;
  byId("notes").replaceChildren(...report.left_out.map((note) => make("li", { class: "hint" }, note)));
  const best = Object.fromEntries(SHOWN.map((measure) => [measure.key,
    Math.max(...report.models.map((model) => goodness(model[measure.key].value, measure)))]));
  const head = make("tr", {}, make("th", { scope: "col" }, "model"), ...SHOWN.map((measure) =>
    make("th", { scope: "col" }, `${measure.label} ${measure.better === "high" ? "↑" : "↓"}`)));
  const rows = report.models.map((model) => make("tr", {},
    make("th", { scope: "row", title: model.source }, model.name),
    ...SHOWN.map((measure) => {
      const { value, interval } = model[measure.key];
      const isBest = models.length > 1 && goodness(value, measure) === best[measure.key]
        && (value !== null || measure.missing);
      const cell = make("td", isBest ? { class: "best" } : {}, format(value, measure));
      if (interval) cell.append(make("small", {}, `${format(interval[0], measure)} … ${format(interval[1], measure)}`));
      return cell;
    })));
  byId("summary").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  byId("summary-hint").textContent =
    "Means over frames, with 95% bootstrap intervals over files. Blocks and seams compare steps of the error at the"
    + " borders of patches, tiles and chunks with those elsewhere: 1 does not show.";
}

// Distributions ------------------------------------------------------------------------------------------------------

function quantile(sorted, share) {
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/** Round values between two ends, seven at most, and the digits that they need. */
function axisMarks(low, high) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 7));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => (high - low) / size <= 7);
  const marks = [];
  for (let index = Math.ceil(low / step); index * step <= high; index++) marks.push(index * step);
  return [marks, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}

/** Charts are drawn as wide as they are shown, so that their text keeps its size. */
const chartWidth = (id) => Math.max(280, byId(id).clientWidth);

function showDistribution() {
  const measure = PER_FILE.find(({ key }) => key === byId("distribution-measure").value);
  const scale = measure.scale || 1;
  const values = models.map((model) => clips
    .map((clip, index) => ({ index, value: clip.models[model][measure.key] }))
    .filter(({ value }) => value !== null)
    .map(({ index, value }) => ({ index, value: value * scale })));
  const all = values.flat().map(({ value }) => value);
  const [width, row, left, right] = [chartWidth("distribution"), 46, 12, 12];
  const height = models.length * row + 34;
  const chart = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${measure.label} of ${clips.length} files` });
  if (!all.length) {
    chart.append(make("text", { x: left, y: 24 }, "no file has a finite value"));
  } else {
    const pad = (Math.max(...all) - Math.min(...all)) * 0.04 || Math.abs(all[0]) * 0.05 || 1;
    const [low, high] = [Math.min(...all) - pad, Math.max(...all) + pad];
    const place = (value) => left + (value - low) / (high - low) * (width - left - right);
    const [marks, digits] = axisMarks(low, high);
    for (const mark of marks) {
      chart.append(make("line", { class: "axis", x1: place(mark), x2: place(mark), y1: 0, y2: height - 20 }));
      chart.append(make("text", { x: place(mark), y: height - 6, "text-anchor": "middle" }, mark.toFixed(digits)));
    }
    values.forEach((points, number) => {
      const [colour, middle] = [COLOURS[number % COLOURS.length], number * row + 32];
      chart.append(make("text", { x: left, y: middle - 18 }, models[number]));
      if (!points.length) return;
      const sorted = points.map(({ value }) => value).sort((a, b) => a - b);
      const [from, median, to] = [0.25, 0.5, 0.75].map((share) => place(quantile(sorted, share)));
      chart.append(make("rect", { class: "spread", x: from, width: Math.max(1, to - from), y: middle - 12, height: 24,
        fill: colour }));
      chart.append(make("line", { x1: median, x2: median, y1: middle - 12, y2: middle + 12, stroke: colour,
        "stroke-width": 2 }));
      for (const { index, value } of points) {
        // Spread by a fixed rule, so that equal values stay apart and the picture stays the same.
        const offset = ((index * 37) % 17) - 8;
        chart.append(make("circle", { class: "mark", cx: place(value), cy: middle + offset, r: 4, fill: colour,
          onclick: () => openClip(index, models[number]) },
        make("title", {}, `${clips[index].name}: ${value.toFixed(measure.digits)}`)));
      }
    });
  }
  byId("distribution").replaceChildren(chart);
}

// Files --------------------------------------------------------------------------------------------------------------

function showClips() {
  const [model, key] = [byId("clips-model").value, byId("clips-measure").value];
  const measure = PER_FILE.find((entry) => entry.key === key);
  const sign = byId("clips-order").value === "worst" ? 1 : -1;
  const compare = (a, b) => (a === b ? 0 : a < b ? -1 : 1);
  const order = clips.map((clip, index) => index).sort((a, b) => sign * compare(
    goodness(clips[a].models[model][key], measure), goodness(clips[b].models[model][key], measure)));
  const head = make("tr", {}, make("th", { scope: "col" }, "file"), make("th", { scope: "col" }, "size"),
    ...PER_FILE.map(({ label }) => make("th", { scope: "col" }, label)));
  const rows = order.slice(0, Number(byId("clips-count").value)).map((index) => {
    const clip = clips[index];
    const name = clip.pictures.frames
      ? make("button", { type: "button", onclick: () => openClip(index, model) }, clip.name) : clip.name;
    const size = `${clip.width}×${clip.height}${clip.kind === "video" ? ` × ${clip.frames}` : ""}`;
    return make("tr", {}, make("td", {}, name), make("td", {}, size),
      ...PER_FILE.map((entry) => make("td", {}, format(clip.models[model][entry.key], entry))));
  });
  byId("clips").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

// Before and after ---------------------------------------------------------------------------------------------------

const viewer = { clip: null, frame: 0, playing: false, zoom: 1, x: 0, y: 0, loading: 0 };
const stage = byId("stage");
const media = () => [...stage.querySelectorAll("video, img")];
const videos = () => [...stage.querySelectorAll("video")];

function pictureOf(clip, owner, kind) {
  return (owner === source ? clip.pictures : clip.models[owner].pictures)[kind];
}

function openClip(index, model) {
  if (!clips[index].pictures.frames) return;
  byId("clip").value = index;
  byId("left").value = source;
  byId("right").value = model;
  loadClip();
  byId("viewer").scrollIntoView({ block: "start" });
  stage.focus({ preventScroll: true });
}

function loadClip() {
  pause();
  const clip = viewer.clip = clips[Number(byId("clip").value)];
  const isVideo = clip.kind === "video";
  for (const side of ["left", "right"]) {
    const owner = byId(side).value;
    const pane = byId(`pane-${side}`);
    pane.querySelectorAll("video, img").forEach((old) => old.remove());
    const element = isVideo ? make("video", { playsinline: "", preload: "auto" }) : make("img", { alt: owner });
    if (isVideo) element.muted = true;
    element.src = pictureOf(clip, owner, "frames");
    pane.prepend(element);
    byId(`tag-${side}`).textContent = owner;
  }
  viewer.frame = 0;
  byId("player").hidden = !isVideo;
  byId("time").max = Math.max(0, clip.shown_frames - 1);
  if (isVideo) {
    const [leader] = videos();
    leader.addEventListener("ended", restart);
  }
  showStage();
  showFrame();
  showDetails();
}

function showStage() {
  const clip = viewer.clip;
  const view = byId("view").value;
  const even = (side) => (clip.kind === "video" ? side + side % 2 : side);
  const ratio = even(clip.width) * (view === "side" ? 2 : 1) / even(clip.height);
  stage.dataset.view = view;
  stage.style.aspectRatio = ratio;
  stage.style.maxWidth = `calc(80vh * ${ratio})`;
  stage.dataset.zoomed = viewer.zoom > 1;
  const share = Number(byId("slider").value);
  byId("pane-right").style.clipPath = `inset(0 0 0 ${share}%)`;
  byId("divider").style.left = `${share}%`;
  byId("slider").disabled = view !== "slider";
  byId("gain-label").hidden = view !== "difference";
  const gain = (Number(byId("gain").value) / 3).toFixed(3);
  const row = `${gain} ${gain} ${gain} 0 0 `;
  byId("heat-gain").setAttribute("values", `${row.repeat(3)}0 0 0 1 0`);
  const { width, height } = byId("pane-left").getBoundingClientRect();
  viewer.x = Math.min(0, Math.max((1 - viewer.zoom) * width, viewer.x));
  viewer.y = Math.min(0, Math.max((1 - viewer.zoom) * height, viewer.y));
  for (const element of media()) {
    element.style.transform = `translate(${viewer.x}px, ${viewer.y}px) scale(${viewer.zoom})`;
  }
}

function showFrame() {
  const { clip, frame } = viewer;
  byId("time").value = frame;
  byId("position").textContent = `frame ${frame + 1} of ${clip.shown_frames}`;
  const cursor = byId("frame-cursor");
  if (cursor) {
    const x = chartPlace(frame);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
}

function seek(frame) {
  viewer.frame = Math.min(viewer.clip.shown_frames - 1, Math.max(0, frame));
  for (const video of videos()) showAt(video, viewer.frame);
  showFrame();
}

/**
 * Shows a frame of a video; the time lies in its middle, so that rounding cannot show a neighbour. Right after loading,
 * Chromium at times goes on showing the frame before: it is asked again until it says that the new one is seen.
 */
function showAt(video, frame, tries = 5) {
  const { rate } = viewer.clip;
  video.currentTime = (frame + 0.5) / rate;
  if (!video.requestVideoFrameCallback || !tries) return;
  const retry = setTimeout(() => {
    if (video.isConnected && !viewer.playing && viewer.frame === frame) showAt(video, frame, tries - 1);
  }, 200);
  video.requestVideoFrameCallback((now, { mediaTime }) => {
    if (Math.round(mediaTime * rate) === frame) clearTimeout(retry);
  });
}

function step(count) {
  pause();
  seek(viewer.frame + count);
}

async function play() {
  if (!viewer.clip || viewer.clip.kind !== "video" || viewer.playing) return;
  viewer.playing = true;
  byId("play").textContent = "Pause";
  byId("play").setAttribute("aria-pressed", "true");
  if (viewer.frame >= viewer.clip.shown_frames - 1) seek(0);
  const [leader, follower] = videos();
  follower.currentTime = leader.currentTime;
  // A pause before playing has begun, or a clip that is replaced, is no error.
  await Promise.allSettled([leader.play(), follower.play()]);
  requestAnimationFrame(follow);
}

/** Keeps the right video in step with the left one, and the controls with both. */
function follow() {
  if (!viewer.playing) return;
  const [leader, follower] = videos();
  const drift = follower.currentTime - leader.currentTime;
  if (Math.abs(drift) > 0.25) follower.currentTime = leader.currentTime;
  else follower.playbackRate = Math.abs(drift) < 0.25 / viewer.clip.rate ? 1 : 1 - Math.max(-0.5, Math.min(0.5, 4 * drift));
  viewer.frame = Math.min(viewer.clip.shown_frames - 1, Math.floor(leader.currentTime * viewer.clip.rate + 1e-3));
  showFrame();
  requestAnimationFrame(follow);
}

function pause() {
  const wasPlaying = viewer.playing;
  viewer.playing = false;
  byId("play").textContent = "Play";
  byId("play").setAttribute("aria-pressed", "false");
  for (const video of videos()) {
    video.pause();
    video.playbackRate = 1;
  }
  if (wasPlaying) seek(viewer.frame);
}

function restart() {
  if (!viewer.playing) return;
  for (const video of videos()) {
    video.currentTime = 0;
    video.play().catch(() => {});
  }
}

// The PSNR of each frame, and what else there is of a file -----------------------------------------------------------

const CHART = { height: 120, left: 40, right: 10, top: 8, bottom: 18 };

function chartPlace(frame) {
  const last = Math.max(1, viewer.clip.frames - 1);
  return CHART.left + frame / last * (chartWidth("frames-chart") - CHART.left - CHART.right);
}

function showDetails() {
  const clip = viewer.clip;
  const owners = [byId("left").value, byId("right").value].filter((owner) => owner !== source);
  const shown = owners.length ? owners : models.slice(0, 1);
  byId("frames-chart").replaceChildren(...(clip.kind === "video" ? [framesChart(shown)] : []));
  const facts = shown.map((model) => `${model}: ${PER_FILE.map((measure) =>
    `${measure.label} ${format(clip.models[model][measure.key], measure)}`).join(", ")}`);
  const cut = clip.shown_frames < clip.frames ? `The first ${clip.shown_frames} of ${clip.frames} frames are shown. ` : "";
  byId("clip-facts").textContent = `${cut}${facts.join(". ")}.`;
  const figures = [];
  for (const model of shown) {
    const row = clip.models[model];
    if (row.pictures.blocks) {
      figures.push(make("figure", {}, make("img", { src: row.pictures.blocks, alt: "reference and reconstruction" }),
        make("figcaption", {}, `Where the patches of ${model} show most: reference left, reconstruction right`
          + ` (frame ${row.blocks.frame + 1}, from ${row.blocks.left}, ${row.blocks.top})`)));
    }
    if (row.pictures.latent) {
      figures.push(make("figure", {}, make("img", { src: row.pictures.latent, alt: "latent channels" }),
        make("figcaption", {}, `Latent channels of ${model}, each stretched to its own range`)));
    }
  }
  byId("details").replaceChildren(...figures);
}

function framesChart(shown) {
  const { height, left, right, top, bottom } = CHART;
  const width = chartWidth("frames-chart");
  const chart = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": "PSNR of each frame in decibels" });
  const values = shown.flatMap((model) => viewer.clip.models[model].frame_psnr).filter((value) => value !== null);
  if (!values.length) {
    chart.append(make("text", { x: left, y: 24 }, "PSNR is infinite in all frames"));
    return chart;
  }
  const [low, high] = [Math.min(...values) - 0.25, Math.max(...values) + 0.25];
  const place = (value) => top + (high - value) / (high - low) * (height - top - bottom);
  const [marks, digits] = axisMarks(low, high);
  for (const mark of marks) {
    chart.append(make("line", { class: "axis", x1: left, x2: width - right, y1: place(mark), y2: place(mark) }));
    chart.append(make("text", { x: left - 6, y: place(mark) + 4, "text-anchor": "end" }, mark.toFixed(digits)));
  }
  for (const model of shown) {
    let line = "";
    viewer.clip.models[model].frame_psnr.forEach((value, frame, all) => {
      if (value === null) return;
      line += `${frame && all[frame - 1] !== null ? "L" : "M"}${chartPlace(frame).toFixed(1)} ${place(value).toFixed(1)}`;
    });
    chart.append(make("path", { d: line, fill: "none", "stroke-width": 2,
      stroke: COLOURS[models.indexOf(model) % COLOURS.length] }));
  }
  chart.append(make("text", { x: left, y: height - 4 }, `PSNR of each frame, dB: ${shown.join(", ")}`));
  chart.append(make("line", { id: "frame-cursor", y1: top, y2: height - bottom, stroke: "currentColor",
    x1: chartPlace(viewer.frame), x2: chartPlace(viewer.frame) }));
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    pause();
    seek(Math.round((x - left) / (width - left - right) * Math.max(1, viewer.clip.frames - 1)));
  });
  return chart;
}

// Latents and skipped files ------------------------------------------------------------------------------------------

function showLatents() {
  const rows = report.models.filter((model) => model.latents);
  byId("latents-section").hidden = !rows.length;
  const list = (values) => values.map((value) => value.toFixed(2)).join("  ");
  const number = (value) => (value === null ? "–" : value.toPrecision(3));
  byId("latents").replaceChildren(
    make("thead", {}, make("tr", {}, ...["model", "channels", "MMD²", "MMD² normalised", "mean of each channel",
      "standard deviation of each channel"].map((label) => make("th", { scope: "col" }, label)))),
    make("tbody", {}, ...rows.map(({ name, latents }) => make("tr", {}, make("th", { scope: "row" }, name),
      ...[latents.channels, number(latents.mmd), number(latents.mmd_normalised), list(latents.mean), list(latents.std)]
        .map((text) => make("td", {}, String(text)))))));
}

function showSkipped() {
  byId("skipped-section").hidden = !report.skipped.length;
  byId("skipped").replaceChildren(...report.skipped.map(({ input, reason }) => make("li", {}, `${input}: ${reason}`)));
}

// Controls -----------------------------------------------------------------------------------------------------------

function moveSlider(clientX) {
  const { left, width } = stage.getBoundingClientRect();
  byId("slider").value = 100 * (clientX - left) / width;
  showStage();
}

function pan(dx, dy) {
  viewer.x += dx;
  viewer.y += dy;
  showStage();
}

stage.addEventListener("pointerdown", (event) => {
  stage.setPointerCapture(event.pointerId);
  if (viewer.zoom === 1 && byId("view").value === "slider") moveSlider(event.clientX);
});
stage.addEventListener("pointermove", (event) => {
  if (!stage.hasPointerCapture(event.pointerId)) return;
  if (viewer.zoom > 1) pan(event.movementX, event.movementY);
  else if (byId("view").value === "slider") moveSlider(event.clientX);
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = {
  " ": () => (viewer.playing ? pause() : play()),
  ",": () => step(-1),
  ".": () => step(1),
  Home: () => step(-Infinity),
  End: () => step(Infinity),
};
stage.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const arrow = ARROWS[event.key];
  if (arrow && viewer.zoom > 1) pan(-40 * arrow[0], -40 * arrow[1]);
  else if (arrow && arrow[0]) {
    byId("slider").value = Number(byId("slider").value) + 2 * arrow[0];
    showStage();
  } else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

byId("play").addEventListener("click", () => (viewer.playing ? pause() : play()));
byId("back").addEventListener("click", () => step(-1));
byId("forward").addEventListener("click", () => step(1));
byId("time").addEventListener("input", () => {
  pause();
  seek(Number(byId("time").value));
});
byId("zoom").addEventListener("change", () => {
  const { width, height } = byId("pane-left").getBoundingClientRect();
  const zoom = Number(byId("zoom").value);
  // The middle of what is seen stays in the middle.
  viewer.x = width / 2 - (width / 2 - viewer.x) / viewer.zoom * zoom;
  viewer.y = height / 2 - (height / 2 - viewer.y) / viewer.zoom * zoom;
  viewer.zoom = zoom;
  showStage();
});
for (const id of ["slider", "gain"]) byId(id).addEventListener("input", showStage);
byId("view").addEventListener("change", showStage);
for (const id of ["clip", "left", "right"]) byId(id).addEventListener("change", loadClip);
for (const id of ["clips-model", "clips-measure", "clips-order", "clips-count"]) {
  byId(id).addEventListener("change", showClips);
}
byId("distribution-measure").addEventListener("change", showDistribution);
addEventListener("resize", () => {
  showDistribution();
  if (!viewer.clip) return;
  showStage();
  showDetails();
});

const measures = PER_FILE.map(({ key, label }) => [key, label]);
fill(byId("distribution-measure"), measures);
fill(byId("clips-measure"), measures);
const owners = [[source, "source"], ...models.map((model) => [model, model])];
fill(byId("left"), owners, source);
// Of the models with an error, the first: to look at nothing but the frames themselves is dull.
const first = (report.models.find((model) => model.psnr.value !== null) || report.models[0]).name;
const withPictures = clips.map((clip, index) => [index, clip.name]).filter(([index]) => clips[index].pictures.frames);
fill(byId("clip"), withPictures);
fill(byId("right"), owners, first);
fill(byId("clips-model"), models.map((model) => [model, model]), first);
showSummary();
showDistribution();
showClips();
showLatents();
showSkipped();
byId("viewer").hidden = !withPictures.length;
if (withPictures.length) loadClip();
