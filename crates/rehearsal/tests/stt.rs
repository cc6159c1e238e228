//! The STT server as a client sees it, and what its witness says of that.

mod stt_client;

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use rehearsal::stt::{Config, End, Server, TcpEnd};
use serde_json::{Value, json};
use stt_client::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

fn start(config: Config) -> Server {
    Server::start(config).expect("a server")
}

const LINEAR16: &str = "encoding=linear16&sample_rate=16000";

#[tokio::test]
async fn ogg_opus_is_decoded_whole_and_measured_where_it_is() {
    let server = start(Config::default().keep_audio(Duration::from_secs(60)));
    let mut client = Client::connect(&server, "model=nova-3").await;
    let signal = [
        silence(0.5, RATE),
        tone(440.0, 0.25, 2.0, RATE),
        silence(0.5, RATE),
    ]
    .concat();
    let file = ogg_opus(&opus_packets(&signal), 5);
    // Cuts across pages and packets.
    client.send_audio_in(&file, 333).await;
    let ended = client.close_stream().await;

    assert_eq!(ended.close_code(), Some(1000));
    let finals = ended.finals();
    let heard: Vec<_> = finals
        .iter()
        .filter(|r| r["channel"]["alternatives"][0]["transcript"] != "")
        .collect();
    assert_eq!(heard.len(), 1, "{finals:#?}");
    let alternative = &heard[0]["channel"]["alternatives"][0];
    let transcript = alternative["transcript"].as_str().expect("text");
    assert!(transcript.starts_with("tone 440 Hz 0.5"), "{transcript}");
    assert!(transcript.ends_with(" s -12 dBFS"), "{transcript}");
    let words = alternative["words"].as_array().expect("words");
    let start = words[0]["start"].as_f64().expect("seconds");
    let end = words[words.len() - 1]["end"].as_f64().expect("seconds");
    assert!((0.48..=0.52).contains(&start), "{start}");
    assert!((2.48..=2.54).contains(&end), "{end}");

    let metadata = ended.of_type("Metadata");
    assert_eq!(metadata.len(), 1);
    assert_eq!(metadata[0]["duration"], 3.0);
    assert_eq!(metadata[0]["request_id"], ended.request_id.as_str());

    let audio = server.audio(&ended.request_id).expect("kept audio");
    assert_eq!(audio.len(), signal.len());
    // The whole tone, not just its ends: 100 ms at a time, clear of the encoder's delay.
    for (index, block) in audio[26_400..].chunks(4800).take(19).enumerate() {
        assert!(purity(block, 440.0) > 0.98, "block {index}");
    }

    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::Acknowledged));
    assert_eq!(record.tcp_end, Some(TcpEnd::Fin));
    assert_eq!(record.audio_seconds, 3.0);
    assert_eq!(record.audio_bytes, file.len() as u64);
    assert_eq!(record.audio_messages, file.len().div_ceil(333) as u64);
    assert!(record.close_requested && record.metadata_sent);
    server.shutdown().await;
}

#[tokio::test]
async fn every_page_layout_of_ogg_gives_the_same_audio() {
    let server = start(Config::default().keep_audio(Duration::from_secs(60)));
    let packets = opus_packets(&tone(330.0, 0.3, 1.0, RATE));
    let mut heard = Vec::new();
    for packets_a_page in [1, 5, 50] {
        let mut client = Client::connect(&server, "encoding=ogg-opus").await;
        client.send_audio(&ogg_opus(&packets, packets_a_page)).await;
        let ended = client.close_stream().await;
        heard.push(server.audio(&ended.request_id).expect("kept audio"));
    }
    assert_eq!(heard[0].len(), 48_000);
    assert!(heard.iter().all(|audio| *audio == heard[0]));
    server.shutdown().await;
}

#[tokio::test]
async fn raw_opus_packets_are_decoded() {
    let server = start(Config::default().keep_audio(Duration::from_secs(60)));
    let mut client = Client::connect(&server, "encoding=opus&sample_rate=48000").await;
    for packet in opus_packets(&tone(330.0, 0.3, 1.0, RATE)) {
        client.send_audio(&packet).await;
    }
    let ended = client.close_stream().await;
    assert_eq!(ended.of_type("Metadata")[0]["duration"], 1.0);
    let audio = server.audio(&ended.request_id).expect("kept audio");
    assert!(purity(&audio[4800..], 330.0) > 0.98);
    server.shutdown().await;
}

#[tokio::test]
async fn messages_have_deepgrams_schema_and_true_times() {
    let server = start(Config::default());
    let query = format!(
        "{LINEAR16}&interim_results=true&vad_events=true&utterance_end_ms=1000&punctuate=true\
         &diarize=true&language=multi"
    );
    let mut client = Client::connect(&server, &query).await;
    let signal = [
        silence(0.8, 16_000),
        tone(1000.0, 0.5, 1.3, 16_000),
        silence(2.0, 16_000),
    ]
    .concat();
    client.send_audio_in(&bytes(&signal), 3200).await;
    let ended = client.close_stream().await;

    let kinds: Vec<_> = ended
        .messages
        .iter()
        .map(|m| (m["type"].as_str().expect("a type"), &m["is_final"]))
        .collect();
    let (no, yes, none) = (&json!(false), &json!(true), &Value::Null);
    assert_eq!(
        kinds,
        [
            ("SpeechStarted", none),
            ("Results", no),
            ("Results", no),
            ("Results", no),
            ("Results", yes),
            ("UtteranceEnd", none),
            ("Results", yes),
            ("Metadata", none),
        ]
    );
    let started = &ended.messages[0];
    assert_eq!(
        *started,
        json!({"type": "SpeechStarted", "channel": [0, 1], "timestamp": 0.8})
    );
    let word = |word: &str, start: f64, end: f64| {
        json!({"word": word, "punctuated_word": word, "start": start, "end": end,
            "confidence": 1.0, "speaker": 0})
    };
    let mut result = ended.messages[4].clone();
    let words = result["channel"]["alternatives"][0]["words"].take();
    assert_eq!(words[0]["start"], 0.8);
    assert_eq!(words[6]["end"], 2.1);
    assert_eq!(
        words[1],
        word(
            "1000",
            words[0]["end"].as_f64().expect("seconds"),
            words[2]["start"].as_f64().expect("seconds")
        )
    );
    assert_eq!(
        result,
        json!({
            "type": "Results",
            "channel_index": [0, 1],
            "start": 0.0,
            "duration": 2.32,
            "is_final": true,
            "speech_final": true,
            "from_finalize": false,
            "channel": {"alternatives": [{
                "transcript": "tone 1000 Hz 0.80-2.10 s -6 dBFS",
                "confidence": 1.0,
                "languages": ["en"],
                "words": null,
            }]},
            "metadata": {
                "request_id": ended.request_id,
                "model_info": {"name": "rehearsal-level-meter", "version": "0.1.0", "arch": "none"},
                "model_uuid": "00000000-0000-4000-8000-726568656172",
            },
        })
    );
    assert_eq!(
        ended.messages[5],
        json!({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 2.1})
    );
    // Final results tile the time line.
    let last = &ended.messages[6];
    assert_eq!(
        (&last["start"], &last["duration"]),
        (&json!(2.32), &json!(1.78))
    );
    let metadata = ended.messages[7].as_object().expect("an object");
    let fields: Vec<_> = metadata.keys().map(String::as_str).collect();
    assert_eq!(
        fields,
        [
            "channels",
            "created",
            "duration",
            "request_id",
            "sha256",
            "transaction_key",
            "type"
        ]
    );
    assert_eq!(metadata["duration"], 4.1);
    assert_eq!(metadata["channels"], 1);
    server.shutdown().await;
}

#[tokio::test]
async fn a_stream_without_audio_ends_with_empty_metadata() {
    let server = start(Config::default());
    let ended = Client::connect(&server, "").await.close_stream().await;
    assert_eq!(ended.messages.len(), 1);
    let metadata = &ended.messages[0];
    assert_eq!(metadata["duration"], 0.0);
    assert_eq!(metadata["channels"], 0);
    assert_eq!(
        metadata["sha256"],
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn finalize_makes_all_audio_so_far_final() {
    let server = start(Config::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    let sound = bytes(&tone(500.0, 0.3, 1.0, 16_000));
    for start in [0.0, 1.0] {
        client.send_audio(&sound).await;
        client.send_type("Finalize").await;
        let result = client.next_json().await;
        assert_eq!(result["from_finalize"], true);
        assert_eq!(result["is_final"], true);
        assert_eq!(result["start"], start);
        assert_eq!(result["duration"], 1.0);
        let words = &result["channel"]["alternatives"][0]["words"];
        assert_eq!(words[0]["start"], start);
    }
    let ended = client.close_stream().await;
    assert_eq!(ended.messages.len(), 1, "{:?}", ended.messages);
    server.shutdown().await;
}

#[tokio::test]
async fn spoken_clips_are_heard_as_phrases() {
    let server = start(Config::default());
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets");
    let mut clips = 0;
    for file in std::fs::read_dir(folder).expect("the folder") {
        let path = file.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "opus") {
            continue;
        }
        clips += 1;
        let mut client = Client::connect(&server, "endpointing=300").await;
        let clip = std::fs::read(&path).expect("the clip");
        assert!(clip.len() < 32 * 1024, "{path:?}");
        client.send_audio_in(&clip, 1000).await;
        let ended = client.close_stream().await;
        let phrases = ended
            .finals()
            .iter()
            .filter_map(|r| r["channel"]["alternatives"][0]["transcript"].as_str())
            .filter(|transcript| transcript.starts_with("speech "))
            .count();
        assert!(
            (3..=4).contains(&phrases),
            "{path:?}: {:#?}",
            ended.finals()
        );
        let seconds = ended.of_type("Metadata")[0]["duration"].as_f64();
        assert!(seconds.is_some_and(|s| (6.0..9.0).contains(&s)), "{path:?}");
    }
    assert!(clips >= 4);
    server.shutdown().await;
}

#[tokio::test]
async fn silence_without_keep_alive_times_out() {
    let server = start(Config::default().idle_timeout(Duration::from_millis(200)));
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 640]).await;
    let ended = client.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1011));
    let reason = ended.close.expect("a close frame").reason;
    assert!(reason.contains("NET-0001"), "{reason}");
    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::TimedOut));
    assert_eq!(record.close_code_sent, Some(1011));
    assert_eq!(record.close_code_received, Some(1011));
    assert!(!record.metadata_sent);
    server.shutdown().await;
}

#[tokio::test]
async fn keep_alive_holds_a_stream_open_that_has_had_audio() {
    let idle = Duration::from_secs(2);
    let server = start(Config::default().idle_timeout(idle));
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 640]).await;
    let begun = std::time::Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let mut sent = 0;
    while begun.elapsed() < idle + Duration::from_millis(500) {
        ticks.tick().await;
        client.send_type("KeepAlive").await;
        sent += 1;
    }
    let ended = client.close_stream().await;
    assert_eq!(ended.close_code(), Some(1000));
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].texts.keep_alive, sent);
    assert_eq!(witness.streams[0].end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn keep_alive_does_not_hold_a_stream_open_that_never_had_audio() {
    let server = start(Config::default().idle_timeout(Duration::from_millis(300)));
    let client = Client::connect(&server, LINEAR16).await;
    let (mut sink, mut stream) = client.ws.split();
    let keep_alive = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            let message = Message::text(r#"{"type":"KeepAlive"}"#);
            if sink.send(message).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let closed = async {
        loop {
            if let Some(Ok(Message::Close(frame))) = stream.next().await {
                return frame.expect("a code").code;
            }
        }
    };
    let code = tokio::select! {
        code = tokio::time::timeout(LIMIT, closed) => code.expect("in time"),
        () = keep_alive => unreachable!(),
    };
    assert_eq!(u16::from(code), 1011);
    drop((sink, stream));
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].end, Some(End::TimedOut));
    server.shutdown().await;
}

#[tokio::test]
async fn bad_audio_is_refused_with_1008() {
    let server = start(Config::default());
    let packets = opus_packets(&tone(330.0, 0.3, 0.2, RATE));
    let mut damaged = ogg_opus(&packets, 5);
    let last = damaged.len() - 10;
    damaged[last] ^= 0x55;
    let mut not_opus = ogg_opus(&packets, 5);
    not_opus[28] = b'X';
    for (query, audio) in [
        ("", b"RIFF\0\0\0\0WAVE".to_vec()),
        ("", damaged),
        ("", not_opus),
        ("encoding=opus&sample_rate=48000", vec![3, 0]),
    ] {
        let mut client = Client::connect(&server, query).await;
        client.send_audio(&audio).await;
        let ended = client.read_to_end().await;
        assert_eq!(ended.close_code(), Some(1008));
        let reason = ended.close.expect("a close frame").reason;
        assert!(reason.contains("DATA-0000"), "{reason}");
    }
    let witness = all_ended(&server).await;
    assert_eq!(witness.opened, 4);
    assert!(
        witness
            .streams
            .iter()
            .all(|s| s.end == Some(End::Undecodable))
    );
    server.shutdown().await;
}

#[tokio::test]
async fn an_empty_audio_message_ends_the_stream_but_is_not_close_stream() {
    let server = start(Config::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 640]).await;
    client.send_audio(&[]).await;
    let ended = client.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1000));
    assert_eq!(ended.of_type("Metadata").len(), 1);
    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::EmptyAudio));
    assert_eq!(record.empty_audio_messages, 1);
    assert!(!record.close_requested);
    server.shutdown().await;
}

#[tokio::test]
async fn unknown_text_is_counted_and_otherwise_ignored() {
    let server = start(Config::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    for text in [r#"{"type":"Configure"}"#, "not json", "", "[[[["] {
        client.send_text(text).await;
    }
    client.close_stream().await;
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].texts.other, 4);
    assert_eq!(witness.streams[0].end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn refused_handshakes_have_deepgrams_shape_and_are_counted() {
    let server = start(Config::default().max_streams(1));
    let key = server.api_key().to_owned();
    let (response, body) = refused(&server, LINEAR16, "wrong key").await;
    assert_eq!(response.status(), 401);
    assert_eq!(body["err_code"], "INVALID_AUTH");
    let header = |name: &str| response.headers()[name].to_str().expect("text");
    assert_eq!(body["request_id"], header("dg-request-id"));
    assert!(header("dg-error").contains("INVALID_AUTH"));

    for query in ["encoding=mp9", "encoding=linear16", "interim_results=maybe"] {
        let (response, body) = refused(&server, query, &key).await;
        assert_eq!(response.status(), 400, "{query}");
        assert_eq!(body["err_code"], "Bad Request");
        assert!(body["err_msg"].is_string() && body["request_id"].is_string());
    }

    let client = Client::connect(&server, LINEAR16).await;
    let (response, body) = refused(&server, LINEAR16, &key).await;
    assert_eq!(response.status(), 429);
    assert_eq!(body["err_code"], "TOO_MANY_REQUESTS");
    client.close_stream().await;

    let witness = all_ended(&server).await;
    let rejected: Vec<_> = witness.rejected.into_iter().collect();
    assert_eq!(rejected, [(400, 3), (401, 1), (429, 1)]);
    assert_eq!(witness.opened, 1);
    // The stream that ended makes room.
    Client::connect(&server, LINEAR16)
        .await
        .close_stream()
        .await;
    server.shutdown().await;
}

#[tokio::test]
async fn the_key_may_come_as_subprotocol_as_browsers_send_it() {
    let server = start(Config::default());
    let mut request = server.url().into_client_request().expect("a request");
    let value = format!("token, {}", server.api_key())
        .parse()
        .expect("a value");
    request
        .headers_mut()
        .insert("sec-websocket-protocol", value);
    let connected = tokio_tungstenite::connect_async(request).await;
    let (ws, response) = connected.expect("a stream");
    assert_eq!(response.headers()["sec-websocket-protocol"], "token");
    drop(ws);
    server.shutdown().await;
}

#[tokio::test]
async fn garbage_never_stops_the_server() {
    use rand::{Rng as _, SeedableRng as _};
    let server = start(Config::default());
    let mut random = rand::rngs::StdRng::seed_from_u64(11);
    let mut noise = |len: usize| {
        let mut noise = vec![0; len];
        random.fill(noise.as_mut_slice());
        noise
    };
    let ogg = ogg_opus(&opus_packets(&tone(330.0, 0.3, 0.5, RATE)), 5);
    for round in 0..20 {
        // Not even HTTP, or HTTP that promises what doesn't come.
        for start in [
            &b""[..],
            b"GET /v1/listen HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
        ] {
            let mut tcp = TcpStream::connect(server.address())
                .await
                .expect("connected");
            // The server may have hung up by then.
            let _ = tcp.write_all(&[start, &noise(300)].concat()).await;
        }
        // Frames that are none.
        let mut tcp = bare_stream(&server, LINEAR16).await;
        let _ = tcp.write_all(&noise(2000)).await;
        drop(tcp);
        // Audio that is none.
        let mut flipped = ogg.clone();
        flipped[round * 37 % ogg.len()] ^= 1 << (round % 8);
        for (query, audio) in [
            ("", noise(4000)),
            ("", flipped),
            ("", [&ogg[..round * 20], &noise(500)].concat()),
            ("encoding=opus&sample_rate=48000", noise(300)),
            (LINEAR16, noise(4001)),
            (
                "encoding=linear16&sample_rate=8000&channels=16",
                noise(4001),
            ),
        ] {
            let mut client = Client::connect(&server, query).await;
            client.send_audio(&audio).await;
            let _ = client
                .ws
                .send(Message::text(r#"{"type":"CloseStream"}"#))
                .await;
            client.read_to_end().await;
        }
    }
    let witness = all_ended(&server).await;
    assert_eq!(witness.opened, 20 * 7);
    assert!(witness.streams.iter().all(|s| s.end != Some(End::Lost)));
    Client::connect(&server, LINEAR16)
        .await
        .close_stream()
        .await;
    server.shutdown().await;
}

#[tokio::test]
async fn messages_beyond_the_limit_are_refused() {
    let server = start(Config::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    // The server may hang up before it has read all of it.
    let _ = client.ws.send(Message::binary(vec![0; 3 << 20])).await;
    drop(client);
    let witness = all_ended(&server).await;
    assert_eq!(
        witness.streams[0].end,
        Some(End::ProtocolError { code: 1009 })
    );
    assert_eq!(witness.streams[0].audio_bytes, 0);
    server.shutdown().await;
}
