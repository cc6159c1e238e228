"""Drives a LiveKit room server through the genuine server SDK (PyPI livekit-api).

The calls, their answers and the errors are checked here, against what LiveKit's own server gives.
The server and its key come from LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET.
Exits with 0, or with a traceback that says what was wrong.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any

from livekit import api, rtc

ROOM = "service"


async def main() -> None:
    async with api.LiveKitAPI() as livekit:
        await asyncio.wait_for(rooms_are_created_listed_and_deleted(livekit.room), 30)
        await asyncio.wait_for(participants_are_listed_and_removed(livekit.room), 30)
        await asyncio.wait_for(mistakes_have_livekits_errors(livekit.room), 30)
    await asyncio.wait_for(wrong_credentials_are_refused(), 30)


async def rooms_are_created_listed_and_deleted(service: Any) -> None:
    request = api.CreateRoomRequest(
        name=ROOM, empty_timeout=77, departure_timeout=7, max_participants=9, metadata="meta"
    )
    created = await service.create_room(request)
    assert created.name == ROOM and created.sid.startswith("RM_"), created
    assert created.empty_timeout == 77 and created.departure_timeout == 7, created
    assert created.max_participants == 9 and created.metadata == "meta", created
    again = await service.create_room(request)
    assert again.sid == created.sid, "creating a room that exists gives that room"
    other = await service.create_room(api.CreateRoomRequest(name="other"))

    async def listed(*names: str) -> list[str]:
        answer = await service.list_rooms(api.ListRoomsRequest(names=names))
        return sorted(room.sid for room in answer.rooms)

    assert await listed() == sorted([created.sid, other.sid])
    assert await listed("other", "absent") == [other.sid]
    await service.delete_room(api.DeleteRoomRequest(room="other"))
    assert await listed() == [created.sid]


async def participants_are_listed_and_removed(service: Any) -> None:
    token = api.AccessToken().with_identity("ann").with_name("Ann")
    token = token.with_grants(api.VideoGrants(room_join=True, room=ROOM))
    room = rtc.Room()
    gone = asyncio.get_running_loop().create_future()
    room.on("disconnected", lambda reason: gone.done() or gone.set_result(reason))
    await room.connect(os.environ["LIVEKIT_URL"], token.to_jwt())

    listing = api.ListParticipantsRequest(room=ROOM)
    [ann] = (await service.list_participants(listing)).participants
    assert (ann.identity, ann.name) == ("ann", "Ann"), ann
    assert ann.sid == room.local_participant.sid, ann
    whom = api.RoomParticipantIdentity(room=ROOM, identity="ann")
    assert (await service.get_participant(whom)).sid == ann.sid

    await service.remove_participant(whom)
    reason = await gone
    assert reason == rtc.DisconnectReason.PARTICIPANT_REMOVED, reason
    assert not (await service.list_participants(listing)).participants
    await service.delete_room(api.DeleteRoomRequest(room=ROOM))


async def mistakes_have_livekits_errors(service: Any) -> None:
    absent = api.RoomParticipantIdentity(room=ROOM, identity="ann")
    no_room, no_participant = "requested room does not exist", "participant does not exist"
    await refused(
        service.delete_room(api.DeleteRoomRequest(room=ROOM)), 404, "not_found", no_room
    )
    for call in (service.get_participant, service.remove_participant):
        await refused(call(absent), 404, "not_found", no_participant)
    nameless = service.create_room(api.CreateRoomRequest())
    await refused(nameless, 400, "invalid_argument", "no room name")
    # The genuine server, too, has an empty list for a room that does not exist.
    assert not (await service.list_participants(api.ListParticipantsRequest(room=ROOM))).participants


async def wrong_credentials_are_refused() -> None:
    key, secret = os.environ["LIVEKIT_API_KEY"], os.environ["LIVEKIT_API_SECRET"]
    for credentials in ((key, secret[::-1]), ("other", secret)):
        async with api.LiveKitAPI(None, *credentials) as livekit:
            await refused(livekit.room.list_rooms(api.ListRoomsRequest()), 401)
    # Signed well, but allowed too little.
    token = api.AccessToken().with_identity("ann")
    token = token.with_grants(api.VideoGrants(room_join=True, room=ROOM)).to_jwt()
    async with api.LiveKitAPI(token=token) as livekit:
        await refused(
            livekit.room.list_rooms(api.ListRoomsRequest()),
            401,
            "unauthenticated",
            "permissions denied",
        )


async def refused(
    call: Awaitable[Any], status: int, code: str | None = None, message: str | None = None
) -> None:
    """Awaits the call, which must fail in this way; None stands for anything."""
    try:
        answer = await call
    except api.ServerError as error:
        assert error.status == status, error
        assert code in (None, error.code), error
        assert message in (None, error.message), error
    else:
        raise AssertionError(f"expected {status} {message}, got {answer}")


if __name__ == "__main__":
    asyncio.run(main())
