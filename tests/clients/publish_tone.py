"""Joins a LiveKit room with the genuine Python SDK, publishes a pure tone, steady or rising, and
reports what it sees; it can keep what it hears.

One JSON object a line on stdout, flushed, each with `event` and `t` (Unix time, seconds):
joined, hears, published, subscribed, tone_started, tone_ended, transcription, transcription_failed,
reconnecting, reconnected, disconnected (by the other side or the network; `reason` is the
protocol's DisconnectReason), left (by ourselves), error. Diagnostics go to stderr.

Exit codes: 0 done, 2 wrong usage, 3 could not join, 4 disconnected before the end,
5 could not publish, 6 nobody subscribed in time, 7 leaving did not finish in time,
128 + n ended by signal n (after leaving the room).
"""

from __future__ import annotations

import argparse
import array
import asyncio
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

from livekit import rtc
from livekit.rtc.participant import PublishTrackError  # not re-exported

SAMPLE_RATE = 48_000
FRAME_SAMPLES = SAMPLE_RATE // 100
FULL_SCALE = 32_767
TRANSCRIPTION_TOPIC = "lk.transcription"
LEAVE_TIMEOUT_SECONDS = 10.0

EXIT_NOT_JOINED = 3
EXIT_DISCONNECTED = 4
EXIT_NOT_PUBLISHED = 5
EXIT_NOT_SUBSCRIBED = 6
EXIT_NOT_LEFT = 7
EXIT_SIGNAL_BASE = 128


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    return asyncio.run(ToneClient(parse_arguments()).run())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Publish a pure tone into a LiveKit room and print events as JSON lines."
    )
    parser.add_argument("--url", default=os.environ.get("LIVEKIT_URL"), help="or LIVEKIT_URL")
    parser.add_argument("--token", default=os.environ.get("LIVEKIT_TOKEN"), help="or LIVEKIT_TOKEN")
    parser.add_argument("--hz", type=float, default=440.0, help="pitch of the tone (default 440)")
    parser.add_argument("--to-hz", type=float, help="pitch at the end, if the tone is to rise")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of the tone; 0 publishes nothing (default 5)"
    )
    parser.add_argument(
        "--amplitude", type=int, default=8_000, help=f"peak, 0..{FULL_SCALE} (default 8000)"
    )
    parser.add_argument(
        "--wait-subscriber",
        type=float,
        metavar="SECONDS",
        help="start the tone once someone subscribed, and fail if nobody does in this time",
    )
    parser.add_argument(
        "--lead",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="silence before the tone, so that none of it is lost while media connects",
    )
    parser.add_argument(
        "--connect-timeout", type=float, default=15.0, metavar="SECONDS", help="default 15"
    )
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument(
        "--linger", type=float, default=0.0, metavar="SECONDS", help="stay this long after the tone"
    )
    ending.add_argument(
        "--hear",
        metavar="FILE",
        help="stay until a track is withdrawn that was heard, and write its sound to this file "
        "(16 bit, mono, 48 kHz)",
    )
    ending.add_argument(
        "--stay", action="store_true", help="after the tone, stay until the server disconnects us"
    )
    arguments = parser.parse_args()

    if not arguments.url:
        parser.error("no URL: set LIVEKIT_URL or give --url")
    if not arguments.token:
        parser.error("no token: set LIVEKIT_TOKEN or give --token")
    arguments.to_hz = arguments.to_hz or arguments.hz
    if not all(0 < hz < SAMPLE_RATE / 2 for hz in (arguments.hz, arguments.to_hz)):
        parser.error(f"pitches must lie between 0 and {SAMPLE_RATE // 2}")
    if not 0 <= arguments.amplitude <= FULL_SCALE:
        parser.error(f"--amplitude must lie between 0 and {FULL_SCALE}")
    for name in ("seconds", "lead", "linger", "connect_timeout", "wait_subscriber"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            parser.error(f"--{name.replace('_', '-')} must be a number of seconds, not negative")
    return arguments


def emit(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, "t": round(time.time(), 3), **fields}), flush=True)


class Ended(Exception):
    """The run is over early; carries the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class ToneClient:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments

    async def run(self) -> int:
        # Room and asyncio's primitives belong to the running loop, so they are made here.
        self._room = rtc.Room()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._disconnected = False
        self._leaving = False
        self._readers: set[asyncio.Task[None]] = set()
        self._heard = bytearray()
        self._withdrawn = asyncio.Event()
        self._observe_signals()
        self._observe_room()

        try:
            await self._join()
            await self._publish()
            await self._remain()
            code = 0
        except Ended as ended:
            code = ended.code
        return await self._leave() or code

    def _observe_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, EXIT_SIGNAL_BASE + number)

    def _observe_room(self) -> None:
        self._room.on("disconnected", self._on_disconnected)
        self._room.on("reconnecting", lambda: emit("reconnecting"))
        self._room.on("reconnected", lambda: emit("reconnected"))
        if self._arguments.hear:
            self._room.on("track_subscribed", self._on_track)
            self._room.on("track_unsubscribed", lambda *_: self._withdrawn.set())
        # Before connecting: a stream without a handler when it begins is dropped.
        self._room.register_text_stream_handler(TRANSCRIPTION_TOPIC, self._on_transcription)

    def _on_disconnected(self, reason: int) -> None:
        # The SDK reports our own leaving here too, but not every time; `left` stands for that.
        if self._leaving or self._disconnected:
            return
        self._disconnected = True
        emit("disconnected", reason=reason_name(reason))
        self._end(EXIT_DISCONNECTED)

    def _on_transcription(self, reader: rtc.TextStreamReader, identity: str) -> None:
        task = asyncio.ensure_future(report_transcription(reader, identity))
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    def _on_track(self, track: rtc.Track, *_: Any) -> None:
        self._listening = asyncio.ensure_future(self._listen(track))
        emit("hears", track_sid=track.sid)

    async def _listen(self, track: rtc.Track) -> None:
        stream = rtc.AudioStream(track, sample_rate=SAMPLE_RATE, num_channels=1)
        try:
            async for event in stream:
                self._heard += event.frame.data
        finally:
            await stream.aclose()

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    async def _join(self) -> None:
        connecting = self._room.connect(
            self._arguments.url,
            self._arguments.token,
            rtc.RoomOptions(connect_timeout=self._arguments.connect_timeout),
        )
        try:
            await self._unless_ended(asyncio.wait_for(connecting, self._arguments.connect_timeout))
        except asyncio.TimeoutError:
            self._fail(EXIT_NOT_JOINED, f"could not join within {self._arguments.connect_timeout} s")
        except rtc.ConnectError as error:
            self._fail(EXIT_NOT_JOINED, f"could not join: {error.message}")
        emit(
            "joined",
            room=self._room.name,
            room_sid=await self._unless_ended(self._room.sid),
            identity=self._room.local_participant.identity,
            sid=self._room.local_participant.sid,
            others=sorted(self._room.remote_participants),
        )

    async def _publish(self) -> None:
        if self._arguments.seconds == 0:
            return
        source = rtc.AudioSource(SAMPLE_RATE, 1, queue_size_ms=1000)
        track = rtc.LocalAudioTrack.create_audio_track("tone", source)
        options = rtc.TrackPublishOptions(
            source=rtc.TrackSource.SOURCE_MICROPHONE,
            dtx=False,  # the tone must arrive without gaps
        )
        try:
            publication = await self._unless_ended(
                self._room.local_participant.publish_track(track, options)
            )
        except PublishTrackError as error:
            self._fail(EXIT_NOT_PUBLISHED, f"could not publish: {error.message}")
        emit("published", track_sid=publication.sid)

        if self._arguments.wait_subscriber is not None:
            try:
                await self._unless_ended(
                    asyncio.wait_for(
                        publication.wait_for_subscription(), self._arguments.wait_subscriber
                    )
                )
            except asyncio.TimeoutError:
                self._fail(
                    EXIT_NOT_SUBSCRIBED,
                    f"nobody subscribed within {self._arguments.wait_subscriber} s",
                )
            emit("subscribed", track_sid=publication.sid)

        pitch = (self._arguments.hz, self._arguments.to_hz)
        await self._unless_ended(play_tone(source, pitch, self._arguments.lead, amplitude=0))
        emit("tone_started", track_sid=publication.sid, hz=self._arguments.hz)
        await self._unless_ended(
            play_tone(source, pitch, self._arguments.seconds, self._arguments.amplitude)
        )
        emit("tone_ended", track_sid=publication.sid)

    async def _remain(self) -> None:
        if self._arguments.stay:
            code = await self._ended
            if code != EXIT_DISCONNECTED:
                raise Ended(code)
        elif self._arguments.hear:
            await self._unless_ended(self._withdrawn.wait())
            self._listening.cancel()
            with open(self._arguments.hear, "wb") as file:
                file.write(self._heard)
        elif self._arguments.linger > 0:
            await self._unless_ended(asyncio.sleep(self._arguments.linger))

    async def _leave(self) -> int:
        """Leaves the room if still in it; non-zero if that could not be finished."""
        self._leaving = True
        joined = self._room.isconnected()
        if joined:
            try:
                await asyncio.wait_for(self._room.disconnect(), LEAVE_TIMEOUT_SECONDS)
            except asyncio.TimeoutError:
                emit("error", message=f"leaving did not finish within {LEAVE_TIMEOUT_SECONDS} s")
                return EXIT_NOT_LEFT
        if self._readers:
            # The room's end ends every open text stream, so these finish by themselves.
            await asyncio.wait(self._readers, timeout=LEAVE_TIMEOUT_SECONDS)
        if joined:
            emit("left")
        return 0

    async def _unless_ended(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Awaits `work`, but stops it when the room or a signal ends the run first."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        if not self._ended.done():
            return await task
        # What fails once the room is gone fails because of that: the room's end is the cause.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise Ended(self._ended.result())

    def _fail(self, code: int, message: str) -> None:
        # The SDK's messages may quote the request, and the request carries the token.
        emit("error", message=message.replace(self._arguments.token, "<token>"))
        raise Ended(code) from None


async def report_transcription(reader: rtc.TextStreamReader, identity: str) -> None:
    try:
        text = await reader.read_all()
    except rtc.StreamError as error:
        emit("transcription_failed", identity=identity, message=error.description)
        return
    # Read after the end: the stream's trailer may add attributes.
    emit("transcription", text=text, attributes=reader.info.attributes or {}, identity=identity)


async def play_tone(
    source: rtc.AudioSource, pitch: tuple[float, float], seconds: float, amplitude: int
) -> None:
    """Feeds the tone at the source's own pace and returns when all of it has been played."""
    total = round(seconds * SAMPLE_RATE)
    first, last = (2 * math.pi * hz / SAMPLE_RATE for hz in pitch)
    rise = (last - first) / max(total, 1)
    for start in range(0, total, FRAME_SAMPLES):
        samples = array.array("h", bytes(2 * FRAME_SAMPLES))
        for offset in range(min(FRAME_SAMPLES, total - start)):
            n = start + offset
            samples[offset] = round(amplitude * math.sin((first + rise * n / 2) * n))
        await source.capture_frame(
            rtc.AudioFrame(
                data=samples.tobytes(),
                sample_rate=SAMPLE_RATE,
                num_channels=1,
                samples_per_channel=FRAME_SAMPLES,
            )
        )
    await source.wait_for_playout()


def reason_name(reason: int) -> str:
    try:
        return rtc.DisconnectReason.Name(reason)
    except ValueError:
        return f"UNKNOWN_{reason}"


if __name__ == "__main__":
    sys.exit(main())
