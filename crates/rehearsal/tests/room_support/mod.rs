//! Clients for the room server's tests: plain HTTP, a signalling websocket without WebRTC, and
//! an agent worker. Each test file uses a part of them.
#![allow(dead_code)]

pub mod worker;

use futures_util::{SinkExt, StreamExt};
use livekit_protocol::{
    self as proto, DisconnectReason, signal_request::Message as Request,
    signal_response::Message as Response,
};
use livekit_token::{AccessToken, VideoGrants};
use prost::Message as _;
use rehearsal::room::{Config, Server, Witness};
use serde_json::Value;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, tungstenite};

/// Far more than anything here takes; only a failure waits this long.
pub const LIMIT: Duration = Duration::from_secs(30);

pub fn start(config: Config) -> Server {
    Server::start(config).expect("server starts")
}

pub fn token(server: &Server, identity: &str, grants: VideoGrants) -> String {
    AccessToken::with_api_key(server.api_key(), server.api_secret())
        .with_identity(identity)
        .with_grants(grants)
        .to_jwt()
        .expect("token")
}

pub fn may_join(room: &str) -> VideoGrants {
    VideoGrants {
        room_join: true,
        room: room.into(),
        ..VideoGrants::default()
    }
}

/// Everything the RoomService asks for, in one room.
pub fn may_administer(room: &str) -> VideoGrants {
    VideoGrants {
        room_create: true,
        room_list: true,
        room_admin: true,
        room: room.into(),
        ..VideoGrants::default()
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("json body")
    }
}

/// One request on a connection of its own.
pub async fn http(
    server: &Server,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let address = server.http_url().replace("http://", "");
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    let exchange = async {
        let mut stream = TcpStream::connect(&address).await?;
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(b"\r\n").await?;
        stream.write_all(body).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = timeout(LIMIT, exchange).await.expect("in time");
    let answer = answer.expect("an answer");
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.expect("a head");
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    Answer {
        status: status.expect("a status"),
        head,
        body: answer[end + 4..].to_vec(),
    }
}

pub async fn get(server: &Server, path: &str) -> Answer {
    http(server, "GET", path, &[], &[]).await
}

/// A RoomService call in JSON.
pub async fn twirp(server: &Server, grants: VideoGrants, method: &str, body: Value) -> Answer {
    call(server, grants, &format!("RoomService/{method}"), body).await
}

/// A call of any service in JSON, such as `RoomService/CreateRoom`.
pub async fn call(server: &Server, grants: VideoGrants, method: &str, body: Value) -> Answer {
    let bearer = format!("Bearer {}", token(server, "admin", grants));
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    let path = format!("/twirp/livekit.{method}");
    http(server, "POST", &path, &headers, body.to_string().as_bytes()).await
}

/// A participant's websocket.
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub join: proto::JoinResponse,
}

impl Client {
    /// Joins with two peer connections, none of which will ever come up.
    pub async fn join(server: &Server, identity: &str, grants: VideoGrants) -> Self {
        Self::join_with(server, &token(server, identity, grants)).await
    }

    pub async fn join_with(server: &Server, token: &str) -> Self {
        let mut socket = connect(server, &format!("/rtc?access_token={token}"))
            .await
            .expect("websocket");
        match next(&mut socket).await {
            Some(Response::Join(join)) => Self { socket, join },
            other => panic!("no join response but {other:?}"),
        }
    }

    pub fn sid(&self) -> &str {
        let participant = self.join.participant.as_ref();
        &participant.expect("participant").sid
    }

    pub async fn send(&mut self, request: Request) {
        let message = Some(request);
        let frame = proto::SignalRequest { message }.encode_to_vec();
        self.send_raw(tungstenite::Message::binary(frame)).await;
    }

    pub async fn send_raw(&mut self, message: tungstenite::Message) {
        self.socket.send(message).await.expect("sent");
    }

    /// Reads on until a message satisfies `wanted`.
    pub async fn until<T>(&mut self, mut wanted: impl FnMut(Response) -> Option<T>) -> T {
        let search = async {
            loop {
                let message = next(&mut self.socket).await.expect("websocket is open");
                if let Some(found) = wanted(message) {
                    return found;
                }
            }
        };
        timeout(LIMIT, search).await.expect("message in time")
    }

    /// Reads on until the server sends it away; its reason.
    pub async fn until_leave(&mut self) -> DisconnectReason {
        self.until(|m| match m {
            Response::Leave(leave) => Some(leave.reason()),
            _ => None,
        })
        .await
    }

    /// Reads on until the server has closed the websocket.
    pub async fn until_closed(&mut self) {
        let drain = async { while let Some(Ok(_)) = self.socket.next().await {} };
        timeout(LIMIT, drain).await.expect("closed in time");
    }

    /// Reads on until the connection ends; whether the server said so, by a Leave or a close
    /// frame.
    pub async fn until_end(&mut self) -> bool {
        let drain = async {
            let mut said = false;
            while let Some(Ok(frame)) = self.socket.next().await {
                said |= match frame {
                    tungstenite::Message::Close(_) => true,
                    tungstenite::Message::Binary(bytes) => {
                        let response = proto::SignalResponse::decode(bytes);
                        let message = response.expect("signal response").message;
                        matches!(message, Some(Response::Leave(_)))
                    }
                    _ => false,
                };
            }
            said
        };
        timeout(LIMIT, drain).await.expect("ended in time")
    }

    /// Reads on until an update about `identity` comes.
    pub async fn until_update(&mut self, identity: &str) -> proto::ParticipantInfo {
        self.until(|m| match m {
            Response::Update(update) => {
                let mut infos = update.participants.into_iter();
                infos.find(|p| p.identity == identity)
            }
            _ => None,
        })
        .await
    }
}

/// Opens a websocket; an error has the HTTP status if the server refused it.
pub async fn connect(
    server: &Server,
    path: &str,
) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>, Box<tungstenite::Error>> {
    let url = format!("{}{path}", server.url());
    let connecting = tokio_tungstenite::connect_async(url);
    let connected = timeout(LIMIT, connecting).await.expect("connects in time");
    connected.map(|(socket, _)| socket).map_err(Box::new)
}

pub async fn next(socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>) -> Option<Response> {
    loop {
        match timeout(LIMIT, socket.next())
            .await
            .expect("frame in time")?
        {
            Ok(tungstenite::Message::Binary(bytes)) => {
                let response = proto::SignalResponse::decode(bytes).expect("signal response");
                return response.message;
            }
            Ok(tungstenite::Message::Close(_)) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// Waits until the server has seen what `condition` asks for.
pub async fn wait(server: &Server, what: &str, condition: impl FnMut(&Witness) -> bool) -> Witness {
    match server.wait_for(condition, LIMIT).await {
        Ok(witness) => witness,
        Err(witness) => panic!("{what}: {witness:#?}"),
    }
}
