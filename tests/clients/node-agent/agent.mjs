// An agent worker on LiveKit's own framework for Node.js (npm @livekit/agents, with its Deepgram
// plugin).
//
// It takes a job for each room, streams the first participant who comes to the STT server, and prints
// each final transcript, one JSON object a line. The server and its key come from LIVEKIT_URL,
// LIVEKIT_API_KEY and LIVEKIT_API_SECRET, the STT server and its key from STT_URL and DEEPGRAM_API_KEY;
// its own HTTP server takes AGENT_PORT.

import { fileURLToPath } from 'node:url';

import { ServerOptions, cli, defineAgent, voice } from '@livekit/agents';
import * as deepgram from '@livekit/agents-plugin-deepgram';

const tell = (what) => process.stdout.write(JSON.stringify(what) + '\n');

export default defineAgent({
  entry: async (context) => {
    // Nothing here speaks or answers, and the provider alone decides what is speech.
    const stt = new deepgram.STT({ baseUrl: process.env.STT_URL.replace(/\/v1\/listen$/, '') });
    const session = new voice.AgentSession({ stt, turnDetection: 'stt' });
    session.on(voice.AgentSessionEventTypes.UserInputTranscribed, (event) => {
      if (event.isFinal) tell({ event: 'transcript', text: event.transcript });
    });
    await session.start({ agent: new voice.Agent({ instructions: '' }), room: context.room });
    await context.connect();
  },
});

cli.runApp(
  new ServerOptions({
    agent: fileURLToPath(import.meta.url),
    host: '127.0.0.1',
    // 0 would be 8081, which a second one could not have.
    port: Number(process.env.AGENT_PORT),
    // Machines that test are busy, and the server gives nothing to a worker without a free core.
    loadFunc: async () => 0.5,
    numIdleProcesses: 1,
    initializeProcessTimeout: 60_000,
  }),
);
