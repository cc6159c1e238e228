// A page of a real browser joins a LiveKit room through the genuine browser SDK (npm livekit-client),
// publishes a tone that rises, once somebody has subscribed to it, and keeps what it hears.
//
// Arguments: pitch at the start and at the end, seconds, and the file for the sound (16 bit, mono,
// 48 kHz) of the track that it hears, written when that is withdrawn. From the environment:
// LIVEKIT_URL, LIVEKIT_TOKEN, and CHROMIUM, the browser's path. Prints one JSON object a line:
// `hears`, when it has subscribed; `tone_ended`; `left`. Exits with 0, or says on stderr what failed.

import { writeFile } from "node:fs/promises";
import { bounded, emit, inBrowser } from "./browser.mjs";

const [hz, toHz, seconds] = process.argv.slice(2, 5).map(Number);
const file = process.argv[5];
const AMPLITUDE = 8_000 / 32_767;

await inBrowser(async (open) => {
  const page = await open("page");
  await page.exposeFunction("emit", emit);
  const { LIVEKIT_URL: url, LIVEKIT_TOKEN: token } = process.env;
  await bounded("joining", page.evaluate(joinInPage, { url, token }));
  await bounded("the tone", page.evaluate(playInPage, {
    hz,
    toHz,
    seconds,
    amplitude: AMPLITUDE,
  }));
  const heard = await bounded("the other's track", page.evaluate(() => window.heard));
  await writeFile(file, Int16Array.from(heard));
  page.removeAllListeners("console");
  await bounded("leaving", page.evaluate(() => window.room.disconnect()));
  emit("left");
});

// The functions below run in the page, and see nothing of this file.

async function joinInPage({ url, token }) {
  const { Room, RoomEvent } = window.LivekitClient;
  const audio = new AudioContext({ sampleRate: 48_000 });
  const recorder = `registerProcessor("recorder", class extends AudioWorkletProcessor {
    process([[samples]]) {
      if (samples) this.port.postMessage(samples.slice());
      return true;
    }
  })`;
  await audio.audioWorklet.addModule(URL.createObjectURL(
    new Blob([recorder], { type: "text/javascript" }),
  ));
  const room = new Room();
  Object.assign(window, { audio, room });
  window.heard = new Promise((resolve) => {
    const heard = [];
    room.on(RoomEvent.TrackSubscribed, (track) => {
      // Without an element that plays it, nothing of it is decoded.
      document.body.append(track.attach());
      const source = audio.createMediaStreamSource(new MediaStream([track.mediaStreamTrack]));
      const node = new AudioWorkletNode(audio, "recorder", {
        channelCount: 1,
        channelCountMode: "explicit",
      });
      node.port.onmessage = ({ data }) => {
        for (const sample of data) heard.push(Math.round(sample * 32_767));
      };
      source.connect(node);
      window.emit("hears");
    });
    room.on(RoomEvent.TrackUnsubscribed, () => resolve(heard));
  });
  await room.connect(url, token);
}

async function playInPage({ hz, toHz, seconds, amplitude }) {
  const { RoomEvent, Track } = window.LivekitClient;
  const { audio, room } = window;
  const length = seconds * audio.sampleRate;
  const tone = audio.createBuffer(1, length, audio.sampleRate);
  const [first, last] = [hz, toHz].map((pitch) => (2 * Math.PI * pitch) / audio.sampleRate);
  const rise = (last - first) / length;
  tone.copyToChannel(
    Float32Array.from({ length }, (_, n) => amplitude * Math.sin((first + (rise * n) / 2) * n)),
    0,
  );
  const player = new AudioBufferSourceNode(audio, { buffer: tone });
  const output = new MediaStreamAudioDestinationNode(audio, { channelCount: 1 });
  player.connect(output);
  const subscribed = new Promise((resolve) => room.on(RoomEvent.LocalTrackSubscribed, resolve));
  await room.localParticipant.publishTrack(output.stream.getAudioTracks()[0], {
    source: Track.Source.Microphone,
    // Without gaps.
    dtx: false,
  });
  await subscribed;
  const ended = new Promise((resolve) => player.addEventListener("ended", resolve));
  // After a second of silence, so that none of it is lost while media connects.
  player.start(audio.currentTime + 1);
  await ended;
  window.emit("tone_ended");
}
