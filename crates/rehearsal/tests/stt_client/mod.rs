//! A client of the STT server for tests: signals, encoders, a websocket and a bare socket.
#![allow(dead_code)] // Each test binary uses its own part.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use livekit_token::{AccessToken, InferenceGrants};
use rehearsal::stt::{Server, Witness};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::handshake::client::{Request, Response};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// For what must happen; only a broken server comes near it.
pub const LIMIT: Duration = Duration::from_secs(30);
pub const RATE: usize = 48_000;

pub fn tone(hz: f64, amplitude: f64, seconds: f64, rate: usize) -> Vec<i16> {
    (0..(seconds * rate as f64) as usize)
        .map(|n| {
            let phase = n as f64 * hz / rate as f64 * std::f64::consts::TAU;
            (amplitude * 32767.0 * phase.sin()) as i16
        })
        .collect()
}

pub fn silence(seconds: f64, rate: usize) -> Vec<i16> {
    vec![0; (seconds * rate as f64) as usize]
}

pub fn bytes(pcm: &[i16]) -> Vec<u8> {
    pcm.iter().flat_map(|sample| sample.to_le_bytes()).collect()
}

/// Share of the signal's energy at this frequency: 1 for a pure tone.
pub fn purity(pcm: &[i16], hz: f64) -> f64 {
    let (mut cosine, mut sine, mut energy) = (0.0, 0.0, 0.0);
    for (n, &sample) in pcm.iter().enumerate() {
        let phase = n as f64 * hz / RATE as f64 * std::f64::consts::TAU;
        let sample = f64::from(sample);
        cosine += sample * phase.cos();
        sine += sample * phase.sin();
        energy += sample * sample;
    }
    2.0 * (cosine * cosine + sine * sine) / (pcm.len() as f64 * energy).max(1.0)
}

/// Opus packets of 20 ms, 48 kHz mono.
pub fn opus_packets(pcm: &[i16]) -> Vec<Vec<u8>> {
    use unsafe_libopus::*;
    let mut error = 0;
    // SAFETY: valid arguments; the encoder is destroyed below and not used after that.
    unsafe {
        let encoder = opus_encoder_create(RATE as i32, 1, OPUS_APPLICATION_AUDIO, &mut error);
        assert_eq!(error, OPUS_OK);
        let packets = pcm
            .chunks_exact(960)
            .map(|frame| {
                let mut packet = vec![0; 1500];
                let len = opus_encode(encoder, frame.as_ptr(), 960, packet.as_mut_ptr(), 1500);
                packet.truncate(usize::try_from(len).expect("an encoded frame"));
                packet
            })
            .collect();
        opus_encoder_destroy(encoder);
        packets
    }
}

/// An Ogg-Opus stream, `packets_a_page` packets a page, no samples to skip.
pub fn ogg_opus(packets: &[Vec<u8>], packets_a_page: usize) -> Vec<u8> {
    use ogg::writing::{PacketWriteEndInfo, PacketWriter};
    let serial = 0x5717;
    let mut head = b"OpusHead".to_vec();
    head.extend([1, 1, 0, 0]);
    head.extend(48_000_u32.to_le_bytes());
    head.extend([0, 0, 0]);
    let mut tags = b"OpusTags".to_vec();
    tags.extend([4, 0, 0, 0]);
    tags.extend(b"test");
    tags.extend([0, 0, 0, 0]);

    let mut file = Vec::new();
    let mut writer = PacketWriter::new(&mut file);
    for header in [head, tags] {
        writer
            .write_packet(header, serial, PacketWriteEndInfo::EndPage, 0)
            .expect("written");
    }
    for (index, packet) in packets.iter().enumerate() {
        let end = if index + 1 == packets.len() {
            PacketWriteEndInfo::EndStream
        } else if (index + 1) % packets_a_page == 0 {
            PacketWriteEndInfo::EndPage
        } else {
            PacketWriteEndInfo::NormalPacket
        };
        let granule = (index as u64 + 1) * 960;
        writer
            .write_packet(packet.clone(), serial, end, granule)
            .expect("written");
    }
    drop(writer);
    file
}

/// A websocket to the server.
pub struct Client {
    pub ws: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub request_id: String,
}

/// How the server ended its side.
#[derive(Debug)]
pub struct Ended {
    pub request_id: String,
    pub messages: Vec<Value>,
    pub close: Option<CloseFrame>,
}

impl Ended {
    pub fn of_type(&self, kind: &str) -> Vec<&Value> {
        let of_type = |message: &&Value| message["type"] == kind;
        self.messages.iter().filter(of_type).collect()
    }

    pub fn finals(&self) -> Vec<&Value> {
        let mut results = self.of_type("Results");
        results.retain(|message| message["is_final"] == true);
        results
    }

    pub fn close_code(&self) -> Option<u16> {
        self.close.as_ref().map(|frame| frame.code.into())
    }
}

impl Client {
    pub async fn connect(server: &Server, query: &str) -> Self {
        let (ws, response) = connect(server, query, server.api_key())
            .await
            .expect("a stream");
        let request_id = response.headers()["dg-request-id"]
            .to_str()
            .expect("text")
            .to_owned();
        let client = Self { ws, request_id };
        client.tcp().set_nodelay(true).expect("set");
        client
    }

    pub async fn send_text(&mut self, text: &str) {
        self.ws.send(Message::text(text)).await.expect("sent");
    }

    pub async fn send_type(&mut self, kind: &str) {
        self.send_text(&format!(r#"{{"type":"{kind}"}}"#)).await;
    }

    pub async fn send_audio(&mut self, bytes: &[u8]) {
        let message = Message::binary(bytes.to_vec());
        self.ws.send(message).await.expect("sent");
    }

    /// Sends audio in messages of this size.
    pub async fn send_audio_in(&mut self, bytes: &[u8], message: usize) {
        for chunk in bytes.chunks(message) {
            self.send_audio(chunk).await;
        }
    }

    /// A session of LiveKit Inference that has not been created yet.
    pub async fn connect_inference(server: &Server, query: &str) -> Self {
        let token = inference_token(server, Duration::from_secs(600));
        let (ws, response) = connect_to(&inference_request(server, query, &token))
            .await
            .expect("a session");
        let request_id = response.headers()["dg-request-id"]
            .to_str()
            .expect("text")
            .to_owned();
        let client = Self { ws, request_id };
        client.tcp().set_nodelay(true).expect("set");
        client
    }

    /// Sends JSON as text.
    pub async fn send_json(&mut self, json: Value) {
        self.send_text(&json.to_string()).await;
    }

    /// Sends audio as LiveKit Inference has it, in messages of 50 ms at 16 kHz.
    pub async fn send_input_audio(&mut self, pcm: &[i16]) {
        use base64::Engine as _;
        for chunk in bytes(pcm).chunks(1600) {
            let audio = base64::prelude::BASE64_STANDARD.encode(chunk);
            self.send_json(json!({"type": "input_audio", "audio": audio}))
                .await;
        }
    }

    /// The next JSON message.
    pub async fn next_json(&mut self) -> Value {
        let message = tokio::time::timeout(LIMIT, self.ws.next()).await;
        match message.expect("in time") {
            Some(Ok(Message::Text(text))) => serde_json::from_str(&text).expect("JSON"),
            other => panic!("not a text message: {other:?}"),
        }
    }

    /// Reads until the server has ended the stream, answers its close frame on the way, and lets
    /// go of the socket.
    pub async fn read_to_end(mut self) -> Ended {
        let mut ended = Ended {
            request_id: self.request_id.clone(),
            messages: Vec::new(),
            close: None,
        };
        let reading = async {
            while let Some(Ok(message)) = self.ws.next().await {
                match message {
                    Message::Text(text) => {
                        let json = serde_json::from_str(&text).expect("JSON");
                        ended.messages.push(json);
                    }
                    Message::Close(frame) => ended.close = frame,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(LIMIT, reading).await.expect("in time");
        ended
    }

    pub async fn close_stream(mut self) -> Ended {
        self.send_type("CloseStream").await;
        self.read_to_end().await
    }

    /// The bare TCP socket.
    pub fn tcp(&self) -> &TcpStream {
        match self.ws.get_ref() {
            MaybeTlsStream::Plain(tcp) => tcp,
            _ => panic!("not a plain socket"),
        }
    }
}

/// A handshake, whatever comes of it.
pub async fn connect(
    server: &Server,
    query: &str,
    key: &str,
) -> Result<(WebSocketStream<MaybeTlsStream<TcpStream>>, Response), Error> {
    connect_as(server, query, &format!("Token {key}")).await
}

/// The same with this Authorization.
pub async fn connect_as(
    server: &Server,
    query: &str,
    authorization: &str,
) -> Result<(WebSocketStream<MaybeTlsStream<TcpStream>>, Response), Error> {
    let mut request = format!("{}?{query}", server.url())
        .into_client_request()
        .expect("a request");
    let value = authorization.parse().expect("a header value");
    request.headers_mut().insert("authorization", value);
    connect_to(&request).await
}

/// A token that allows to open sessions of LiveKit Inference.
pub fn inference_token(server: &Server, ttl: Duration) -> String {
    let (key, secret) = server.inference_keys();
    AccessToken::with_api_key(key, secret)
        .with_identity("agent")
        .with_ttl(ttl)
        .with_inference_grants(InferenceGrants::default().with_perform())
        .to_jwt()
        .expect("a token")
}

/// The handshake of a LiveKit Inference client.
pub fn inference_request(server: &Server, query: &str, token: &str) -> Request {
    let url = format!("{}/stt?{query}", server.inference_url()).replace("http://", "ws://");
    let mut request = url.into_client_request().expect("a request");
    let value = format!("Bearer {token}").parse().expect("a header value");
    request.headers_mut().insert("authorization", value);
    request
}

/// This handshake, whatever comes of it.
pub async fn connect_to(
    request: &Request,
) -> Result<(WebSocketStream<MaybeTlsStream<TcpStream>>, Response), Error> {
    tokio::time::timeout(LIMIT, connect_async(request.clone()))
        .await
        .expect("in time")
}

/// This handshake refused: status, headers, body.
pub async fn refused_request(request: &Request) -> (Response, Value) {
    match connect_to(request).await {
        Err(Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            let body = serde_json::from_slice(body).expect("JSON");
            (*response, body)
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// A refused handshake: status, headers, body.
pub async fn refused(server: &Server, query: &str, key: &str) -> (Response, Value) {
    match connect(server, query, key).await {
        Err(Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            let body = serde_json::from_slice(body).expect("JSON");
            (*response, body)
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// A plain HTTP request: status and body, null if that is empty.
pub async fn http(
    server: &Server,
    method: &str,
    path: &str,
    authorization: &str,
    body: &str,
) -> (u16, Value) {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         Authorization: {authorization}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut tcp = TcpStream::connect(server.address())
        .await
        .expect("connected");
    tcp.write_all(request.as_bytes()).await.expect("written");
    let mut response = String::new();
    tokio::time::timeout(LIMIT, tcp.read_to_string(&mut response))
        .await
        .expect("in time")
        .expect("text");
    let (head, body) = response.split_once("\r\n\r\n").expect("a response");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let body = match body {
        "" => Value::Null,
        body => serde_json::from_str(body).expect("JSON"),
    };
    (status.expect("a status"), body)
}

/// A stream over a socket that knows nothing of websockets: what is not sent here isn't sent.
pub async fn bare_stream(server: &Server, query: &str) -> TcpStream {
    let tcp = TcpStream::connect(server.address()).await;
    bare_handshake(tcp.expect("connected"), server, query).await
}

/// The same, with a receive buffer of about this many bytes.
pub async fn bare_stream_with_window(server: &Server, query: &str, window: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(window).expect("set");
    let tcp = socket.connect(server.address()).await;
    bare_handshake(tcp.expect("connected"), server, query).await
}

async fn bare_handshake(mut tcp: TcpStream, server: &Server, query: &str) -> TcpStream {
    let request = format!(
        "GET /v1/listen?{query} HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Token {}\r\n\r\n",
        server.api_key()
    );
    tcp.write_all(request.as_bytes()).await.expect("written");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await.expect("a response"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{head:?}");
    tcp
}

/// A frame as clients send it, masked with zeros; payloads of up to 125 bytes.
pub fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() < 126);
    let mut frame = vec![0x80 | opcode, 0x80 | payload.len() as u8, 0, 0, 0, 0];
    frame.extend_from_slice(payload);
    frame
}

/// The account once no stream is open any more.
pub async fn all_ended(server: &Server) -> Witness {
    server
        .wait_for(|w| w.opened > 0 && w.open_now == 0, LIMIT)
        .await
        .expect("all streams end")
}
