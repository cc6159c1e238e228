"""Streams a recording to an STT server through Deepgram's own SDK (PyPI deepgram-sdk).

The address comes from STT_URL (`ws://host:port`, without a path), the key from DEEPGRAM_API_KEY,
the file (Ogg-Opus) from the command line. Prints one JSON object a line: `transcript` for each
final result, then `metadata`. Exits with 0 once the server has closed the connection by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from deepgram import AsyncDeepgramClient, DeepgramClientEnvironment
from deepgram.core.events import EventType
from deepgram.listen.v1.types import ListenV1Metadata, ListenV1Results

CHUNK_BYTES = 2_000
LIMIT_SECONDS = 30


async def stream(recording: bytes) -> None:
    url = os.environ["STT_URL"]
    environment = DeepgramClientEnvironment(base=url, production=url, agent=url, agent_rest=url)
    client = AsyncDeepgramClient(environment=environment)
    failures: list[Exception] = []

    def on_message(message: object) -> None:
        if isinstance(message, ListenV1Results) and message.is_final:
            text = message.channel.alternatives[0].transcript
            emit("transcript", text=text, start=message.start, duration=message.duration)
        elif isinstance(message, ListenV1Metadata):
            emit("metadata", request_id=message.request_id, duration=message.duration)

    # The container says how it is encoded, so no encoding is named.
    async with client.listen.v1.connect(model="nova-3", interim_results=True) as connection:
        connection.on(EventType.MESSAGE, on_message)
        connection.on(EventType.ERROR, failures.append)
        listening = asyncio.create_task(connection.start_listening())
        for start in range(0, len(recording), CHUNK_BYTES):
            await connection.send_media(recording[start : start + CHUNK_BYTES])
        await connection.send_keep_alive()
        await connection.send_close_stream()
        # Ends with the connection, which the server closes after its last message.
        await listening
    assert not failures, failures


def emit(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(stream(Path(sys.argv[1]).read_bytes()), LIMIT_SECONDS))
