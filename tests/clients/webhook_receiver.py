"""Receives webhooks with LiveKit's own WebhookReceiver (PyPI livekit-api), which checks that each is
signed by the server's key and is as it was sent.

It listens on a free port of 127.0.0.1 and prints one JSON object a line: first where it listens, then
each request as it came and whether it was accepted (answered with 200) or refused (401). The key
comes from LIVEKIT_API_KEY and LIVEKIT_API_SECRET. It ends, with 0, with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web
from livekit import api

receiver = api.WebhookReceiver(api.TokenVerifier())


async def receive(request: web.Request) -> web.Response:
    body = await request.text()
    token = request.headers.get("Authorization", "")
    try:
        event = receiver.receive(body, token)
    # It raises no type of its own, but whatever its parts raise.
    except Exception as error:  # noqa: BLE001
        tell(event="refused", error=f"{type(error).__name__}: {error}")
        return web.Response(status=401)
    tell(
        event="accepted",
        name=event.event,
        room=event.room.name,
        participant=event.participant.identity,
        track=event.track.sid,
        body=body,
        token=token,
    )
    return web.Response()


async def main() -> None:
    app = web.Application()
    app.router.add_post("/hook", receive)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    tell(event="listens", name=f"{host}:{port}")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
