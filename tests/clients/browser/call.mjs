// Two pages of a real browser meet in a LiveKit room through the genuine browser SDK (npm
// livekit-client): "single" on one peer connection, "dual" on two. Each publishes the browser's fake
// microphone, which beeps, and listens to the other.
//
// From the environment: LIVEKIT_URL, TOKEN_SINGLE, TOKEN_DUAL, and CHROMIUM, the browser's path.
// Prints one JSON object a line: `joined`; `hears`, with what the browser's statistics say of the
// other's audio; `transcribed`, once a transcript of the page's own audio has come back. Stays until
// standard input ends, then each page leaves (`left`). Exits with 0, or says on stderr what failed.

import { once } from "node:events";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { finished } from "node:stream/promises";
import { chromium } from "playwright-core";

const sdk = createRequire(import.meta.url).resolve("livekit-client");
const LIMIT_MS = 45_000;
const TRANSCRIPTION_TOPIC = "lk.transcription";

// From loopback, since browsers let only such pages use the microphone without TLS and connect to
// servers on loopback.
const site = createServer((_, response) => {
  response.setHeader("content-type", "text/html").end("<!doctype html>");
}).listen(0, "127.0.0.1");
await once(site, "listening");
const stdinEnded = finished(process.stdin.resume());
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: [
    "--disable-gpu",
    "--no-proxy-server",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
  ],
});
try {
  const pages = {
    single: await join("single", process.env.TOKEN_SINGLE, true),
    dual: await join("dual", process.env.TOKEN_DUAL, false),
  };
  await forEach(pages, (name, page) => listen(name, page));
  await stdinEnded;
  await forEach(pages, (name, page) => leave(name, page));
} finally {
  await browser.close();
  site.close();
}

async function join(name, token, singlePeerConnection) {
  const context = await browser.newContext({ permissions: ["microphone"] });
  const page = await context.newPage();
  page.setDefaultTimeout(LIMIT_MS);
  page.on("pageerror", (error) => console.error(name, error));
  page.on("console", (message) => {
    // Without queries of addresses: they have tokens.
    if (message.type() === "error") console.error(name, message.text().replaceAll(/\?\S*/g, ""));
  });
  await page.goto(`http://127.0.0.1:${site.address().port}/`);
  await page.addScriptTag({ path: sdk });
  await bounded(`${name} joins`, page.evaluate(joinInPage, {
    url: process.env.LIVEKIT_URL,
    token,
    singlePeerConnection,
    topic: TRANSCRIPTION_TOPIC,
  }));
  emit("joined", { name });
  return page;
}

async function listen(name, page) {
  const heard = await bounded(`${name} hears the other`, page.evaluate(hearInPage));
  emit("hears", { name, ...heard });
  const text = await bounded(`${name} is transcribed`, page.evaluate(() => window.transcribed));
  emit("transcribed", { name, text });
}

async function leave(name, page) {
  // If the server ends the websocket first, the SDK logs that as an error.
  page.removeAllListeners("console");
  await bounded(`${name} leaves`, page.evaluate(() => window.room.disconnect()));
  emit("left", { name });
}

// The functions below run in the page, and see nothing of this file.

async function joinInPage({ url, token, singlePeerConnection, topic }) {
  const { Room, RoomEvent } = window.LivekitClient;
  const room = new Room({ singlePeerConnection });
  window.room = room;
  // Before connecting: what comes without a handler is dropped.
  room.on(RoomEvent.TrackSubscribed, (track) => document.body.append(track.attach()));
  window.transcribed = new Promise((resolve) => {
    room.registerTextStreamHandler(topic, async (reader, { identity }) => {
      const text = await reader.readAll();
      if (identity === room.localParticipant.identity && text) resolve(text);
    });
  });
  await room.connect(url, token);
  await room.localParticipant.setMicrophoneEnabled(true);
}

async function hearInPage() {
  const heard = { packets: 0, lost: 0, energy: 0 };
  while (heard.packets < 50 || heard.energy === 0) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    const participants = [...window.room.remoteParticipants.values()];
    const publications = participants.flatMap((p) => [...p.audioTrackPublications.values()]);
    const track = publications.find((publication) => publication.track)?.track;
    for (const report of (await track?.getRTCStatsReport())?.values() ?? []) {
      if (report.type !== "inbound-rtp") continue;
      heard.packets = report.packetsReceived;
      heard.lost = report.packetsLost;
      heard.energy = report.totalAudioEnergy;
    }
  }
  return heard;
}

// End of what runs in the page.

async function bounded(what, work) {
  let timer;
  const tooLate = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not within ${LIMIT_MS} ms`)), LIMIT_MS);
  });
  return Promise.race([work, tooLate]).finally(() => clearTimeout(timer));
}

function forEach(pages, work) {
  return Promise.all(Object.entries(pages).map(([name, page]) => work(name, page)));
}

function emit(event, fields) {
  console.log(JSON.stringify({ event, ...fields }));
}
