"""Two genuine clients (PyPI livekit, on genuine libwebrtc) meet in a room and try what it can do.

Each publishes a tone of its own and must hear the other's. Then data, a text stream, an RPC, mute
and unmute; at the end one is removed by the API and the room is deleted under the other. The server
and its key come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET, the room from the command
line. Prints one JSON object a line for each step that held, with the seconds it took. Exits with 0,
or with a traceback that says what did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
from livekit import api, rtc

RATE = 48_000
FRAME = RATE // 100
WINDOW = RATE // 10
AMPLITUDE = 8_000
TONES_HZ = {"ann": 440, "bob": 1_000}
# How many windows in a row must have the tone, or silence.
WINDOWS_IN_A_ROW = 10
# For each step; generous, since machines are busy.
LIMIT_SECONDS = 30


async def main() -> None:
    parser = argparse.ArgumentParser(description="Two LiveKit clients try a room.")
    parser.add_argument("room")
    parser.add_argument("--peer-connections", type=int, choices=(1, 2), default=1)
    arguments = parser.parse_args()
    ann, bob = (Client(identity, arguments.room) for identity in TONES_HZ)
    async with api.LiveKitAPI() as livekit:
        try:
            await meet(ann, bob, single=arguments.peer_connections == 1)
            await exchange_data(ann, bob)
            await mute_and_unmute(ann, bob)
            await be_sent_away(ann, bob, livekit.room)
        except Exception:
            for client in (ann, bob):
                client.tell()
            raise
        finally:
            for client in (ann, bob):
                await client.stop()


async def meet(ann: Client, bob: Client, single: bool) -> None:
    async with step("both joined"):
        await ann.join(single)
        await bob.join(single)
    async with step("both published and hear the other's tone"):
        await ann.publish()
        await bob.publish()
        await ann.hears(has_tone(TONES_HZ["bob"]))
        await bob.hears(has_tone(TONES_HZ["ann"]))


async def exchange_data(ann: Client, bob: Client) -> None:
    speak = ann.room.local_participant
    async with step("reliable data arrives"):
        large = os.urandom(14_000)
        await speak.publish_data(large, reliable=True, topic="large")
        await bob.sees("data", large, "large", rtc.DataPacketKind.KIND_RELIABLE, "ann")
    async with step("lossy data arrives"):
        expected = ("data", b"lossy", "quick", rtc.DataPacketKind.KIND_LOSSY, "ann")
        # It may be lost, and is sent again, as a sender of such data would.
        while not bob.has_seen(*expected):
            await speak.publish_data(b"lossy", reliable=False, topic="quick")
            await asyncio.sleep(0.1)
    async with step("a text stream of 50 kB arrives"):
        text = "".join(f"line {number:05} \u00e9\n" for number in range(4_000))[:50_000]
        await speak.send_text(text, topic="chat")
        await bob.sees("text", text, "ann")
    async with step("an RPC is answered"):
        answer = await speak.perform_rpc(
            destination_identity="bob", method="reverse", payload="stressed"
        )
        assert answer == "desserts", answer


async def mute_and_unmute(ann: Client, bob: Client) -> None:
    async with step("muted"):
        ann.track.mute()
        await bob.sees("muted", ann.publication.sid)
        await bob.hears(is_silent)
    async with step("unmuted"):
        ann.track.unmute()
        await bob.sees("unmuted", ann.publication.sid)
        await bob.hears(has_tone(TONES_HZ["ann"]))


async def be_sent_away(ann: Client, bob: Client, service: Any) -> None:
    room = ann.room.name
    assert not ann.has_seen("reconnecting") and not bob.has_seen("reconnecting")
    async with step("removed by the API"):
        who = api.RoomParticipantIdentity(room=room, identity="bob")
        await service.remove_participant(who)
        await bob.sees("disconnected", "PARTICIPANT_REMOVED")
    async with step("the other one sees it"):
        await ann.sees("left", "bob")
    async with step("the room is deleted"):
        assert not ann.has_seen("disconnected", "PARTICIPANT_REMOVED")
        await service.delete_room(api.DeleteRoomRequest(room=room))
        await ann.sees("disconnected", "ROOM_DELETED")


@contextlib.asynccontextmanager
async def step(name: str) -> AsyncIterator[None]:
    """Bounds what is inside in time, and reports how long it took."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            yield
    except TimeoutError:
        raise AssertionError(f"{name}: not within {LIMIT_SECONDS} s") from None
    print(json.dumps({"step": name, "seconds": round(time.monotonic() - begun, 3)}), flush=True)


class Client:
    """One participant, with all that it has seen and what it hears."""

    def __init__(self, identity: str, room: str) -> None:
        self._identity = identity
        self._room_name = room
        self._seen: list[tuple[Any, ...]] = []
        self._windows: asyncio.Queue[np.ndarray] | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._player: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self.room = rtc.Room()
        self._observe()

    def _observe(self) -> None:
        on = self.room.on
        on("data_received", lambda d: self._see("data", d.data, d.topic, d.kind, sender(d)))
        on("track_muted", lambda _, publication: self._see("muted", publication.sid))
        on("track_unmuted", lambda _, publication: self._see("unmuted", publication.sid))
        on("participant_disconnected", lambda who: self._see("left", who.identity))
        on("reconnecting", lambda: self._see("reconnecting"))
        on("disconnected", lambda r: self._see("disconnected", rtc.DisconnectReason.Name(r)))
        on("track_subscribed", lambda track, *_: self._spawn(self._listen(track)))

        def on_text(reader: rtc.TextStreamReader, identity: str) -> None:
            self._spawn(self._read(reader, identity))

        self.room.register_text_stream_handler("chat", on_text)

    async def join(self, single: bool) -> None:
        token = api.AccessToken().with_identity(self._identity)
        token = token.with_grants(api.VideoGrants(room_join=True, room=self._room_name))
        options = rtc.RoomOptions(single_peer_connection=single, connect_timeout=LIMIT_SECONDS)
        await self.room.connect(os.environ["LIVEKIT_URL"], token.to_jwt(), options)
        self.room.local_participant.register_rpc_method("reverse", lambda call: call.payload[::-1])

    async def publish(self) -> None:
        source = rtc.AudioSource(RATE, 1)
        self.track = rtc.LocalAudioTrack.create_audio_track("tone", source)
        self.publication = await self.room.local_participant.publish_track(
            self.track,
            # Without gaps, so that what is heard is the tone or silence, never less.
            rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE, dtx=False),
        )
        self._player = asyncio.ensure_future(play(source, TONES_HZ[self._identity], self._stop))

    async def sees(self, *event: Any) -> None:
        while not self.has_seen(*event):
            self._news.clear()
            await self._news.wait()

    def has_seen(self, *event: Any) -> bool:
        return event in self._seen

    async def hears(self, expected: Callable[[np.ndarray], bool]) -> None:
        """Listens from now on, until the sound has been as expected for a while."""
        self._windows = asyncio.Queue()
        in_a_row = 0
        while in_a_row < WINDOWS_IN_A_ROW:
            in_a_row = in_a_row + 1 if expected(await self._windows.get()) else 0
        self._windows = None

    def tell(self) -> None:
        """Says on stderr what it has seen, for whoever must find out why it was not enough."""
        for event in self._seen:
            print(f"{self._identity} has seen {event!r:.200}", file=sys.stderr)

    async def stop(self) -> None:
        self._stop.set()
        if self._player:
            await asyncio.wait([self._player], timeout=LIMIT_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # Not gathered: asyncio itself reports what made one fail.
            await asyncio.wait(self._tasks, timeout=LIMIT_SECONDS)
        await asyncio.wait_for(self.room.disconnect(), LIMIT_SECONDS)

    def _see(self, *event: Any) -> None:
        self._seen.append(event)
        self._news.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.ensure_future(work))

    async def _listen(self, track: rtc.Track) -> None:
        heard = np.empty(0)
        stream = rtc.AudioStream(track, sample_rate=RATE, num_channels=1)
        try:
            async for event in stream:
                heard = np.concatenate([heard, np.frombuffer(event.frame.data, np.int16)])
                while len(heard) >= WINDOW:
                    if self._windows is not None:
                        self._windows.put_nowait(heard[:WINDOW])
                    heard = heard[WINDOW:]
        finally:
            await stream.aclose()

    async def _read(self, reader: rtc.TextStreamReader, identity: str) -> None:
        self._see("text", await reader.read_all(), identity)


def sender(packet: rtc.DataPacket) -> str | None:
    return packet.participant.identity if packet.participant else None


async def play(source: rtc.AudioSource, hz: int, stop: asyncio.Event) -> None:
    """Feeds the tone, at the source's own pace. Not to be cancelled amid a frame: the SDK objects."""
    # One second has a whole number of periods, so it can be repeated.
    second = AMPLITUDE * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE)
    samples = second.astype(np.int16)
    for start in itertools.cycle(range(0, RATE, FRAME)):
        if stop.is_set():
            break
        data = samples[start : start + FRAME].tobytes()
        await source.capture_frame(rtc.AudioFrame(data, RATE, 1, FRAME))
    await source.aclose()


def has_tone(hz: int) -> Callable[[np.ndarray], bool]:
    """Whether a window has this tone, at its level, and next to nothing else."""
    turns = np.exp(-2j * np.pi * hz * np.arange(WINDOW) / RATE)

    def check(window: np.ndarray) -> bool:
        power = np.dot(window, window)
        at_hz = 2 * abs(np.dot(window, turns)) ** 2 / WINDOW
        rms = np.sqrt(power / WINDOW)
        return at_hz > 0.95 * power and 0.8 < rms / (AMPLITUDE / np.sqrt(2)) < 1.2

    return check


def is_silent(window: np.ndarray) -> bool:
    return np.abs(window).max() < AMPLITUDE / 100


if __name__ == "__main__":
    asyncio.run(main())
