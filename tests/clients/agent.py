"""An agent worker on LiveKit's own framework (PyPI livekit-agents, with its Deepgram plugin).

It takes a job for each room, or with JOB_TYPE=PUBLISHER for each participant who publishes, streams
the first participant who comes, or that one, to the STT server, prints each final transcript, one
JSON object a line, and ends the job when that participant leaves. The server and its key come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET, the STT server and its key
from STT_URL and DEEPGRAM_API_KEY. SIGTERM ends it, with 0 if nothing was left to be killed.
"""

from __future__ import annotations

import json
import os
import sys

from livekit.agents import (
    Agent,
    AgentServer,
    AgentSession,
    CloseEvent,
    JobContext,
    UserInputTranscribedEvent,
    WorkerType,
    cli,
    room_io,
)
from livekit.plugins import deepgram

server = AgentServer(
    host="127.0.0.1",
    port=0,
    # Machines that test are busy, and the server gives nothing to a worker without a free core.
    load_fnc=lambda: 0.5,
    initialize_process_timeout=60.0,
    num_idle_processes=1,
)


@server.rtc_session(type=WorkerType[os.environ.get("JOB_TYPE", "ROOM")])
async def transcribe(context: JobContext) -> None:
    # Nothing here speaks or answers, and the provider alone decides what is speech.
    session = AgentSession(
        stt=deepgram.STT(base_url=os.environ["STT_URL"]), vad=None, turn_detection="stt"
    )

    @session.on("user_input_transcribed")
    def transcribed(event: UserInputTranscribedEvent) -> None:
        if event.is_final:
            tell(event="transcript", text=event.transcript)

    @session.on("close")
    def closed(event: CloseEvent) -> None:
        tell(event="session closed", reason=event.reason)
        context.shutdown(event.reason)

    options = room_io.RoomOptions()
    if context.job.HasField("participant"):
        # With a name given, the session wants to be in the room already.
        await context.connect()
        options.participant_identity = context.job.participant.identity
    await session.start(Agent(instructions=""), room=context.room, room_options=options)


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run_app(server)
