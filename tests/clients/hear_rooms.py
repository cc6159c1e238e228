"""Hears every audio track of some rooms on the genuine libwebrtc (PyPI livekit), for comparison.

Joins each room of the command line (`name=tracks`), reads all its tracks as PCM for a while, and
prints what that cost as one JSON object: `cpu` in percent of a core, `resident` in KB, `frames` of
100 ms. The server and its key come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time

from livekit import api, rtc

LIMIT_SECONDS = 60
FRAME_MS = 100


async def main() -> None:
    parser = argparse.ArgumentParser(description="What hearing rooms costs the genuine libwebrtc.")
    parser.add_argument("--settle", type=float, default=5, metavar="SECONDS")
    parser.add_argument("--window", type=float, default=20, metavar="SECONDS")
    parser.add_argument("rooms", nargs="+", metavar="NAME=TRACKS")
    arguments = parser.parse_args()
    listener = Listener()
    expected = 0
    for room in arguments.rooms:
        name, tracks = room.split("=")
        expected += int(tracks)
        await listener.join(name)
    async with asyncio.timeout(LIMIT_SECONDS):
        while len(listener.readers) < expected:
            await asyncio.sleep(0.02)
    await asyncio.sleep(arguments.settle)

    resident = resident_kb()
    frames, cpu, begun = listener.frames, time.process_time(), time.monotonic()
    await asyncio.sleep(arguments.window)
    cpu = (time.process_time() - cpu) / (time.monotonic() - begun) * 100
    print(json.dumps({"cpu": cpu, "resident": resident, "frames": listener.frames - frames}))
    # Not what is measured.
    sys.stdout.flush()
    os._exit(0)


class Listener:
    def __init__(self) -> None:
        self.rooms: list[rtc.Room] = []
        self.readers: list[asyncio.Task[None]] = []
        self.frames = 0

    async def join(self, name: str) -> None:
        room = rtc.Room()
        self.rooms.append(room)

        @room.on("track_subscribed")
        def subscribed(track: rtc.Track, *_: object) -> None:
            self.readers.append(asyncio.create_task(self.read(track)))

        grants = api.VideoGrants(room_join=True, room=name)
        token = api.AccessToken().with_identity("subscriber").with_grants(grants).to_jwt()
        await room.connect(os.environ["LIVEKIT_URL"], token)

    async def read(self, track: rtc.Track) -> None:
        async for _ in rtc.AudioStream(track, frame_size_ms=FRAME_MS):
            self.frames += 1


def resident_kb() -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        [line] = [line for line in status if line.startswith("VmRSS:")]
    return float(line.split()[1])


if __name__ == "__main__":
    asyncio.run(main())
