//! The room server over real HTTP and websockets, without WebRTC.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

mod room_support;

use futures_util::SinkExt;
use livekit_protocol::{
    self as proto, DisconnectReason, leave_request::Action, participant_info::State,
    signal_request::Message as Request, signal_response::Message as Response,
};
use livekit_token::{AccessToken, TokenVerifier, VideoGrants};
use prost::Message as _;
use rehearsal::room::{Config, Server};
use room_support::{
    Client, LIMIT, connect, get, http, may_administer, may_join, next, start, token, twirp, wait,
};
use serde_json::json;
use std::{
    net::{TcpListener, UdpSocket},
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_tungstenite::tungstenite::{Error, Message};

#[tokio::test]
async fn tokens_are_checked_with_livekits_messages() {
    let server = start(Config::default());
    let validate = async |token: &str| {
        let answer = get(&server, &format!("/rtc/validate?access_token={token}")).await;
        assert!(answer.head.contains("access-control-allow-origin: *"));
        (answer.status, answer.text())
    };
    let signed = |secret: &str, key: &str, ttl: i64| {
        let mut token = AccessToken::with_api_key(key, secret)
            .with_identity("ann")
            .with_grants(may_join("lobby"));
        if ttl > 0 {
            token = token.with_ttl(Duration::from_secs(ttl as u64));
        }
        token.to_jwt().expect("token")
    };
    let (key, secret) = (server.api_key(), server.api_secret());

    assert_eq!(
        validate(&signed(secret, key, 60)).await,
        (200, "success".into())
    );
    assert_eq!(
        validate("").await,
        (401, "no permissions to access the room".into())
    );
    assert_eq!(
        validate("nonsense").await,
        (401, "invalid authorization token".into())
    );
    assert_eq!(
        validate(&signed(secret, "other", 60)).await,
        (401, "invalid API key".into())
    );
    let (status, message) = validate(&signed("another secret of 32 characters.", key, 60)).await;
    assert!(status == 401 && message.starts_with("invalid authorization token: "));
    let grants = VideoGrants {
        room: "lobby".into(),
        ..VideoGrants::default()
    };
    assert_eq!(
        validate(&token(&server, "ann", grants)).await,
        (401, "permissions denied".into())
    );
    let good = signed(secret, key, 60);
    let basic = [("authorization", good.as_str())];
    assert_eq!(
        http(&server, "GET", "/rtc/validate", &basic, &[])
            .await
            .status,
        401
    );
    let v1 = get(&server, &format!("/rtc/v1/validate?access_token={good}")).await;
    assert_eq!(
        (v1.status, v1.text()),
        (400, "join_request is required".into())
    );
    // Not a websocket.
    let plain = get(&server, &format!("/rtc?access_token={good}")).await;
    assert_eq!(plain.status, 404);
    server.shutdown().await;
}

#[tokio::test]
async fn expired_and_premature_tokens_are_refused() {
    let server = start(Config::default());
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("clock")
        .as_secs();
    // LiveKit's library can't make such tokens.
    let validate = async |nbf: u64, exp: u64| {
        let claims = json!({
            "iss": server.api_key(), "sub": "ann", "nbf": nbf, "exp": exp,
            "video": {"roomJoin": true, "room": "lobby"},
        });
        let token = jwt(&claims, server.api_secret());
        let answer = get(&server, &format!("/rtc/validate?access_token={token}")).await;
        (answer.status, answer.text())
    };
    assert_eq!(validate(now - 5, now + 60).await, (200, "success".into()));
    assert_eq!(validate(now - 999, now - 600).await.0, 401);
    assert_eq!(validate(now + 600, now + 999).await.0, 401);
    server.shutdown().await;
}

#[tokio::test]
async fn a_server_without_single_connections_has_no_v1() {
    let server = start(Config {
        single_peer_connection: false,
        ..Config::default()
    });
    let token = token(&server, "ann", may_join("lobby"));
    let answer = get(&server, &format!("/rtc/v1/validate?access_token={token}")).await;
    assert_eq!(answer.status, 404);
    assert!(answer.head.contains("access-control-allow-origin: *"));
    let refused = connect(&server, &format!("/rtc/v1?access_token={token}")).await;
    assert_eq!(status(refused.err()), Some(404));
    server.shutdown().await;
}

#[tokio::test]
async fn twirp_errors_have_twirps_form() {
    let server = start(Config::default());
    let admin = || may_administer("lobby");
    let check = |answer: room_support::Answer, status: u16, code: &str| {
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (status, Some(code)),
            "{}",
            answer.text()
        );
        assert!(answer.head.contains("content-type: application/json"));
        answer.json()["msg"].as_str().unwrap_or_default().to_owned()
    };
    let nothing = VideoGrants::default;
    let refused = twirp(&server, nothing(), "ListRooms", json!({})).await;
    assert_eq!(check(refused, 401, "unauthenticated"), "permissions denied");
    let elsewhere = twirp(
        &server,
        admin(),
        "ListParticipants",
        json!({"room": "other"}),
    )
    .await;
    check(elsewhere, 401, "unauthenticated");
    let missing = twirp(&server, admin(), "DeleteRoom", json!({"room": "lobby"})).await;
    assert_eq!(
        check(missing, 404, "not_found"),
        "requested room does not exist"
    );
    let who = json!({"room": "lobby", "identity": "nobody"});
    for method in ["GetParticipant", "RemoveParticipant", "UpdateParticipant"] {
        let missing = twirp(&server, admin(), method, who.clone()).await;
        assert_eq!(
            check(missing, 404, "not_found"),
            "participant does not exist"
        );
    }
    let unnamed = twirp(&server, admin(), "CreateRoom", json!({})).await;
    check(unnamed, 400, "invalid_argument");
    let big = json!({"name": "lobby", "metadata": "x".repeat(600_000)});
    check(
        twirp(&server, admin(), "CreateRoom", big).await,
        400,
        "invalid_argument",
    );
    check(
        twirp(&server, admin(), "CreateRoom", json!("nonsense")).await,
        400,
        "malformed",
    );
    check(
        twirp(&server, admin(), "Nothing", json!({})).await,
        404,
        "bad_route",
    );
    let path = "/twirp/livekit.RoomService/ListRooms";
    let untyped = http(&server, "POST", path, &[], b"{}").await;
    check(untyped, 404, "bad_route");
    server.shutdown().await;
}

#[tokio::test]
async fn rooms_are_created_listed_and_deleted_in_both_encodings() {
    let server = start(Config::default());
    let created = twirp(
        &server,
        may_administer(""),
        "CreateRoom",
        json!({"name": "lobby", "empty_timeout": 7, "departureTimeout": 8, "maxParticipants": 9}),
    )
    .await
    .json();
    assert_eq!(created["name"], "lobby");
    assert_eq!(created["empty_timeout"], 7);
    assert_eq!(created["departure_timeout"], 8);
    assert_eq!(created["max_participants"], 9);

    let bearer = format!("Bearer {}", token(&server, "admin", may_administer("")));
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/protobuf"),
    ];
    let names = vec!["lobby".to_owned(), "none".to_owned()];
    let request = proto::ListRoomsRequest { names }.encode_to_vec();
    let path = "/twirp/livekit.RoomService/ListRooms";
    let listed = http(&server, "POST", path, &headers, &request).await;
    let listed = proto::ListRoomsResponse::decode(listed.body.as_slice()).expect("protobuf");
    assert_eq!(listed.rooms.len(), 1);
    assert_eq!(listed.rooms[0].sid, created["sid"].as_str().unwrap_or(""));

    let delete = json!({"room": "lobby"});
    let deleted = twirp(&server, may_administer(""), "DeleteRoom", delete).await;
    assert_eq!(deleted.status, 200);
    let witness = get(&server, "/witness").await.json();
    assert_eq!(witness["rooms"][0]["name"], "lobby");
    assert_eq!(witness["rooms"][0]["end_reason"], "ROOM_DELETED");
    assert!(witness["rooms"][0]["ended"]["unix_ms"].is_u64());
    server.shutdown().await;
}

#[tokio::test]
async fn everyone_learns_who_came_who_left_and_why() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let bob = Client::join(&server, "bob", may_join("lobby")).await;
    let others = &bob.join.other_participants;
    assert_eq!(others.len(), 1);
    assert_eq!(others[0].identity, "ann");
    let came = ann.until_update("bob").await;
    assert_eq!(came.sid, bob.sid());

    // Bob's websocket goes while he has no media.
    drop(bob);
    let left = ann.until_update("bob").await;
    assert_eq!(left.state(), State::Disconnected);
    assert_eq!(left.disconnect_reason(), DisconnectReason::SignalClose);

    // Another Ann takes her place.
    let mut second = Client::join(&server, "ann", may_join("lobby")).await;
    assert_eq!(ann.until_leave().await, DisconnectReason::DuplicateIdentity);
    ann.until_closed().await;

    let cid = Client::join(&server, "cid", may_join("lobby")).await;
    let (sid, cid) = (cid.sid().to_owned(), cid);
    let who = json!({"room": "lobby", "identity": "cid"});
    let removed = twirp(&server, may_administer("lobby"), "RemoveParticipant", who).await;
    assert_eq!(removed.status, 200, "{}", removed.text());
    let mut cid = cid;
    assert_eq!(
        cid.until_leave().await,
        DisconnectReason::ParticipantRemoved
    );
    second
        .until(|m| match m {
            Response::Update(u) => u.participants.into_iter().find(|p| {
                p.sid == sid && p.disconnect_reason() == DisconnectReason::ParticipantRemoved
            }),
            _ => None,
        })
        .await;

    let mut dan = Client::join(&server, "dan", may_join("lobby")).await;
    dan.send(Request::Leave(proto::LeaveRequest::default()))
        .await;
    dan.until_closed().await;

    let room = json!({"room": "lobby"});
    twirp(&server, may_administer("lobby"), "DeleteRoom", room).await;
    assert_eq!(second.until_leave().await, DisconnectReason::RoomDeleted);

    let witness = server.witness();
    let room = witness.room("lobby").expect("room");
    let stays: Vec<_> = room
        .participants
        .iter()
        .map(|p| (p.identity.as_str(), p.reason.expect("left")))
        .collect();
    assert_eq!(
        stays,
        [
            ("ann", DisconnectReason::DuplicateIdentity),
            ("bob", DisconnectReason::SignalClose),
            ("ann", DisconnectReason::RoomDeleted),
            ("cid", DisconnectReason::ParticipantRemoved),
            ("dan", DisconnectReason::ClientInitiated),
        ]
    );
    assert_eq!(room.end_reason, Some(DisconnectReason::RoomDeleted));
    for p in &room.participants {
        let left = p.left.expect("left");
        assert!(p.joined.ms <= left.ms && p.joined.unix_ms <= left.unix_ms);
        assert_eq!(p.active, None, "no media came up");
    }
    let served = get(&server, "/witness").await.json();
    assert_eq!(
        served,
        serde_json::to_value(server.witness()).expect("json")
    );
    server.shutdown().await;
}

#[tokio::test]
async fn rooms_end_when_nobody_holds_them_open() {
    let server = start(Config {
        empty_timeout: Duration::from_millis(1),
        departure_timeout: Duration::from_millis(1),
        ..Config::default()
    });
    let unused = json!({"name": "unused"});
    twirp(&server, may_administer(""), "CreateRoom", unused).await;
    wait(&server, "unused room ends", |w| {
        w.room("unused").and_then(|r| r.end_reason) == Some(DisconnectReason::RoomClosed)
    })
    .await;

    let ann = Client::join(&server, "ann", may_join("lobby")).await;
    let agent = AccessToken::with_api_key(server.api_key(), server.api_secret())
        .with_identity("agent")
        .with_kind("agent")
        .with_grants(VideoGrants {
            agent: true,
            ..may_join("lobby")
        })
        .to_jwt()
        .expect("token");
    let mut agent = Client::join_with(&server, &agent).await;
    assert!(server.witness().live_rooms().any(|r| r.name == "lobby"));
    let list = twirp(&server, may_administer(""), "ListRooms", json!({})).await;
    assert_eq!(list.json()["rooms"][0]["num_participants"], 1);
    drop(ann);
    assert_eq!(agent.until_leave().await, DisconnectReason::RoomClosed);
    let witness = server.witness();
    let lobby = witness.room("lobby").expect("room");
    assert_eq!(lobby.end_reason, Some(DisconnectReason::RoomClosed));
    assert_eq!(lobby.participant("agent").map(|p| p.kind), Some("AGENT"));
    server.shutdown().await;
}

#[tokio::test]
async fn participants_without_media_are_given_up() {
    let server = start(Config {
        join_timeout: Duration::from_millis(1),
        ..Config::default()
    });
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    assert_eq!(ann.until_leave().await, DisconnectReason::JoinFailure);
    server.shutdown().await;
}

#[tokio::test]
async fn a_full_room_refuses_all_but_agents() {
    let server = start(Config::default());
    let room = json!({"name": "lobby", "max_participants": 1});
    twirp(&server, may_administer(""), "CreateRoom", room).await;
    let _ann = Client::join(&server, "ann", may_join("lobby")).await;
    let bob = token(&server, "bob", may_join("lobby"));
    let refused = connect(&server, &format!("/rtc?access_token={bob}")).await;
    assert_eq!(status(refused.err()), Some(500));
    let agent = VideoGrants {
        agent: true,
        ..may_join("lobby")
    };
    let agent = Client::join(&server, "agent", agent).await;
    assert_eq!(agent.join.other_participants.len(), 1);
    // Nobody else's place, but her own.
    let _ann = Client::join(&server, "ann", may_join("lobby")).await;
    server.shutdown().await;
}

#[tokio::test]
async fn hidden_participants_are_seen_by_the_api_alone() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let hidden = VideoGrants {
        hidden: true,
        ..may_join("lobby")
    };
    let ghost = Client::join(&server, "ghost", hidden).await;
    let bob = Client::join(&server, "bob", may_join("lobby")).await;
    let seen: Vec<_> = bob.join.other_participants.iter().collect();
    assert_eq!(seen.len(), 1);
    drop(ghost);
    wait(&server, "ghost leaves", |w| {
        let room = w.room("lobby");
        room.is_some_and(|r| r.participant("ghost").is_some_and(|p| p.left.is_some()))
    })
    .await;
    drop(bob);
    // All updates up to Bob's leaving were about Bob.
    ann.until(|m| match m {
        Response::Update(update) => {
            let mut infos = update.participants.into_iter();
            infos.find_map(|p| {
                assert_ne!(p.identity, "ghost");
                (p.state() == State::Disconnected).then_some(())
            })
        }
        _ => None,
    })
    .await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_stay_goes_on_over_a_new_websocket_only_if_it_is_known() {
    let server = start(Config::default());
    let ann = Client::join(&server, "ann", may_join("lobby")).await;
    let token = token(&server, "ann", may_join("lobby"));
    let sid = ann.sid().to_owned();
    let path = format!("/rtc?reconnect=1&access_token={token}&sid=");
    let mut unknown = connect(&server, &format!("{path}PA_none"))
        .await
        .expect("websocket");
    let Some(Response::Leave(leave)) = next(&mut unknown).await else {
        panic!("no leave");
    };
    assert_eq!(leave.reason(), DisconnectReason::StateMismatch);
    assert_eq!(leave.action(), Action::Reconnect);
    assert!(next(&mut unknown).await.is_none(), "closed");

    let mut known = connect(&server, &format!("{path}{sid}"))
        .await
        .expect("websocket");
    let first = next(&mut known).await;
    assert!(matches!(first, Some(Response::Reconnect(_))), "{first:?}");
    // The end of the old websocket is not the end of the stay.
    let mut ann = ann;
    ann.until_closed().await;
    drop(ann);
    let ping = Some(Request::Ping(1));
    let ping = proto::SignalRequest { message: ping }.encode_to_vec();
    known.send(Message::binary(ping)).await.expect("sent");
    loop {
        let message = next(&mut known).await;
        if matches!(message.expect("still open"), Response::Pong(_)) {
            break;
        }
    }
    let witness = server.witness();
    let room = witness.room("lobby").expect("room");
    assert_eq!(room.participants.len(), 1);
    assert_eq!(
        (room.participants[0].resumes, room.participants[0].left),
        (1, None)
    );
    server.shutdown().await;
}

#[tokio::test]
async fn metadata_permissions_and_limits_hold() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let update = |value: &str| proto::UpdateParticipantMetadata {
        request_id: 5,
        attributes: [("key".to_owned(), value.to_owned())].into(),
        ..Default::default()
    };
    let reason = |m: Response| match m {
        Response::RequestResponse(r) if r.request_id == 5 => Some(r.reason()),
        _ => None,
    };
    use proto::request_response::Reason;
    ann.send(Request::UpdateMetadata(update("v"))).await;
    assert_eq!(ann.until(reason).await, Reason::NotAllowed);
    let allow = json!({
        "room": "lobby", "identity": "ann", "attributes": {"camelKey": "x"},
        "permission": {"can_update_metadata": true, "can_publish": false},
    });
    let updated = twirp(&server, may_administer("lobby"), "UpdateParticipant", allow).await;
    assert_eq!(updated.json()["attributes"]["camelKey"], "x");
    ann.send(Request::UpdateMetadata(update(&"v".repeat(70_000))))
        .await;
    assert_eq!(ann.until(reason).await, Reason::LimitExceeded);
    ann.send(Request::UpdateMetadata(update("v"))).await;
    let info = ann
        .until(|m| match m {
            Response::Update(u) => u
                .participants
                .into_iter()
                .find(|p| p.attributes.get("key").is_some_and(|v| v == "v")),
            _ => None,
        })
        .await;
    assert_eq!(info.attributes["camelKey"], "x");
    // What she may not publish is refused.
    ann.send(Request::AddTrack(proto::AddTrackRequest {
        cid: "mic".into(),
        ..Default::default()
    }))
    .await;
    ann.until(|m| match m {
        Response::RequestResponse(r) => (r.reason() == Reason::NotAllowed).then_some(()),
        Response::TrackPublished(_) => panic!("published without permission"),
        _ => None,
    })
    .await;
    server.shutdown().await;
}

#[tokio::test]
async fn tokens_are_refreshed_on_the_terms_that_hold() {
    let server = start(Config {
        token_refresh: Duration::from_millis(1),
        ..Config::default()
    });
    let verifier = TokenVerifier::with_api_key(server.api_key(), server.api_secret());
    let fresh = |m: Response| match m {
        Response::RefreshToken(token) => Some(verifier.verify(&token).expect("valid")),
        _ => None,
    };
    let short = AccessToken::with_api_key(server.api_key(), server.api_secret())
        .with_ttl(Duration::from_secs(5))
        .with_identity("ann")
        .with_grants(may_join("lobby"))
        .to_jwt()
        .expect("token");
    let mut ann = Client::join_with(&server, &short).await;
    for _ in 0..3 {
        let claims = ann.until(fresh).await;
        let left = claims.exp as u64 - std::time::UNIX_EPOCH.elapsed().expect("clock").as_secs();
        assert!((500..=600).contains(&left), "{left} s");
        assert!(claims.sub == "ann" && claims.video.can_publish());
    }
    let change = json!({
        "room": "lobby", "identity": "ann", "metadata": "m",
        "permission": {"can_subscribe": true, "can_publish_sources": ["MICROPHONE"]},
    });
    let changed = twirp(
        &server,
        may_administer("lobby"),
        "UpdateParticipant",
        change,
    )
    .await;
    assert_eq!(changed.status, 200, "{}", changed.text());
    let claims = ann
        .until(|m| fresh(m).filter(|c| !c.video.can_publish()))
        .await;
    assert_eq!(claims.metadata, "m");
    assert_eq!(claims.video.can_publish_sources, ["microphone"]);
    // It is good for a new stay.
    let token = ann.until(|m| match m {
        Response::RefreshToken(token) => Some(token),
        _ => None,
    });
    let token = token.await;
    let ann = Client::join_with(&server, &token).await;
    let permission = ann.join.participant.and_then(|p| p.permission);
    assert!(!permission.expect("permission").can_publish);
    server.shutdown().await;
}

#[tokio::test]
async fn bad_input_costs_only_its_sender() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let address = server.http_url().replace("http://", "");
    let mut random = 1u32;
    let mut noise = |n: usize| -> Vec<u8> {
        let step = |_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 24) as u8
        };
        (0..n).map(step).collect()
    };
    for n in [1, 2, 20, 1_000, 70_000] {
        let mut stream = TcpStream::connect(&address).await.expect("connects");
        // It may be closed before all is written.
        let _ = stream.write_all(&noise(n)).await;
        let mut stream = TcpStream::connect(&address).await.expect("connects");
        let _ = stream.write_all(&[&[0, 20], &noise(n)[..]].concat()).await;
    }

    let token = |identity: &str| token(&server, identity, may_join("lobby"));
    let path = |identity: &str| format!("/rtc?access_token={}", token(identity));
    for (n, frame) in [
        Message::binary(noise(50)),
        Message::text("nonsense"),
        Message::binary(vec![0xff; 3 << 20]),
    ]
    .into_iter()
    .enumerate()
    {
        let identity = format!("noise-{n}");
        let mut socket = connect(&server, &path(&identity)).await.expect("websocket");
        // The server may close before it has taken all.
        let _ = socket.send(frame).await;
        while next(&mut socket).await.is_some() {}
    }

    let description = |sdp: &str| proto::SessionDescription {
        r#type: "offer".into(),
        sdp: sdp.into(),
        ..Default::default()
    };
    let long = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n".repeat(5_000);
    let offers = ["", "nonsense", "v=0\r\n", "v=0\r\nm=audio 9 X\r\n", &long];
    for (n, sdp) in offers.into_iter().enumerate() {
        let mut client = Client::join(&server, &format!("sdp-{n}"), may_join("lobby")).await;
        client.send(Request::Offer(description(sdp))).await;
        assert_eq!(client.until_leave().await, DisconnectReason::StateMismatch);
        let mut client = Client::join(&server, &format!("answer-{n}"), may_join("lobby")).await;
        client.send(Request::Answer(description(sdp))).await;
        assert_eq!(client.until_leave().await, DisconnectReason::StateMismatch);
    }

    ann.send(Request::Ping(1)).await;
    ann.until(|m| matches!(m, Response::Pong(_)).then_some(()))
        .await;
    let witness = wait(&server, "the noisy ones leave", |w| {
        w.room("lobby").is_some_and(|r| r.present().count() == 1)
    });
    witness.await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let _deaf = Client::join(&server, "deaf", may_join("lobby")).await;
    let reader = tokio::spawn(async move {
        ann.until(|m| match m {
            Response::Update(u) => u
                .participants
                .into_iter()
                .find(|p| p.identity == "deaf" && p.state() == State::Disconnected),
            _ => None,
        })
        .await
        .disconnect_reason()
    });
    // More than any socket buffer holds.
    let deadline = Instant::now() + LIMIT;
    while !reader.is_finished() {
        assert!(Instant::now() < deadline, "still there");
        let metadata = "x".repeat(500_000);
        let update = json!({"room": "lobby", "metadata": metadata});
        let method = "UpdateRoomMetadata";
        let updated = twirp(&server, may_administer("lobby"), method, update).await;
        assert_eq!(updated.status, 200);
    }
    let reason = reader.await.expect("reader");
    assert_eq!(reason, DisconnectReason::SignalClose);
    server.shutdown().await;
}

#[tokio::test]
async fn shutdown_says_goodbye_and_leaves_nothing_behind() {
    let runtime = tokio::runtime::Handle::current();
    let before = runtime.metrics().num_alive_tasks();
    let server = start(Config::default());
    let address = server.http_url().replace("http://", "");
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    // Connections that never say anything must not hold it up.
    let _silent = TcpStream::connect(&address).await.expect("connects");
    let mut half = TcpStream::connect(&address).await.expect("connects");
    half.write_all(b"GET / HT").await.expect("written");
    let (witness, reason) = tokio::join!(server.shutdown(), ann.until_leave());
    assert_eq!(reason, DisconnectReason::ServerShutdown);
    let room = witness.room("lobby").expect("room");
    assert_eq!(room.end_reason, Some(DisconnectReason::ServerShutdown));
    assert_eq!(
        room.participant("ann").and_then(|p| p.reason),
        Some(DisconnectReason::ServerShutdown)
    );
    assert_eq!(runtime.metrics().num_alive_tasks(), before);
    TcpStream::connect(&address).await.expect_err("closed");
}

#[tokio::test]
async fn dropping_the_server_stops_it() {
    let runtime = tokio::runtime::Handle::current();
    let before = runtime.metrics().num_alive_tasks();
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    drop(server);
    ann.until_closed().await;
    let deadline = Instant::now() + LIMIT;
    while runtime.metrics().num_alive_tasks() > before {
        assert!(Instant::now() < deadline, "tasks left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_taken_port_is_an_error() {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = tcp.local_addr().expect("address").port();
    let config = Config {
        port,
        ..Config::default()
    };
    assert!(Server::start(config).is_err());
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let media_port = udp.local_addr().expect("address").port();
    let config = Config {
        media_port,
        ..Config::default()
    };
    assert!(Server::start(config).is_err());
}

#[test]
fn without_a_runtime_starting_is_an_error() {
    assert!(Server::start(Config::default()).is_err());
}

fn status(error: Option<Box<Error>>) -> Option<u16> {
    match *error? {
        Error::Http(response) => Some(response.status().as_u16()),
        other => panic!("{other}"),
    }
}

/// An HS256 token with any claims.
fn jwt(claims: &serde_json::Value, secret: &str) -> String {
    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
    let header = BASE64.encode(json!({"alg": "HS256", "typ": "JWT"}).to_string());
    let signed = format!("{header}.{}", BASE64.encode(claims.to_string()));
    let signature = hmac_sha256(secret.as_bytes(), signed.as_bytes());
    format!("{signed}.{}", BASE64.encode(signature))
}

/// RFC 2104, for keys of at most a block.
fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let pad = |with: u8| {
        let mut block = [with; 64];
        block.iter_mut().zip(key).for_each(|(b, k)| *b ^= k);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message);
    let outer = Sha256::new().chain_update(pad(0x5c));
    outer.chain_update(inner.finalize()).finalize().into()
}
