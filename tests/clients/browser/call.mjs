// Two pages of a real browser meet in a LiveKit room through the genuine browser SDK (npm
// livekit-client): "single" on one peer connection, "dual" on two. Each publishes the browser's fake
// microphone, which beeps, and listens to the other.
//
// From the environment: LIVEKIT_URL, TOKEN_SINGLE, TOKEN_DUAL, and CHROMIUM, the browser's path.
// Prints one JSON object a line: `joined`; `hears`, with what the browser's statistics say of the
// other's audio; `transcribed`, once a transcript of the page's own audio has come back. Stays until
// standard input ends, then each page leaves (`left`). Exits with 0, or says on stderr what failed.

import { finished } from "node:stream/promises";
import { bounded, emit, inBrowser } from "./browser.mjs";

const TRANSCRIPTION_TOPIC = "lk.transcription";

const stdinEnded = finished(process.stdin.resume());
await inBrowser(async (open) => {
  const pages = {
    single: await join(open, "single", process.env.TOKEN_SINGLE, true),
    dual: await join(open, "dual", process.env.TOKEN_DUAL, false),
  };
  await forEach(pages, (name, page) => listen(name, page));
  await stdinEnded;
  await forEach(pages, (name, page) => leave(name, page));
});

async function join(open, name, token, singlePeerConnection) {
  const page = await open(name);
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

function forEach(pages, work) {
  return Promise.all(Object.entries(pages).map(([name, page]) => work(name, page)));
}
