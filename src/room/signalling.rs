//! The SDK's signalling websocket with a small read buffer: `livekit-net`'s own client takes the
//! library's default of 128 KiB a room, for messages of a few kilobytes. Otherwise it does the same,
//! and connections through a proxy are left to it.

use std::{env, io, sync::Arc, time::Duration};

use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use livekit_net::{Header, TransportError, WsClient, WsConnectResult, WsConnection};
use tokio::{net::TcpStream, sync::Mutex, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_tls_with_config,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        error::ProtocolError,
        http::{HeaderName, HeaderValue, Request},
        protocol::WebSocketConfig,
    },
};

use crate::tls;

/// It grows with a longer message.
const READ_BUFFER: usize = 4 << 10;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub struct Client {
    /// `livekit-net`'s own.
    pub native: Arc<dyn WsClient>,
}

#[async_trait::async_trait]
impl WsClient for Client {
    async fn connect(
        &self,
        url: String,
        headers: Vec<Header>,
        timeout_ms: u64,
    ) -> Result<WsConnectResult, TransportError> {
        if has_proxy(&url) {
            return self.native.connect(url, headers, timeout_ms).await;
        }
        let request = request(&url, &headers)?;
        let config = WebSocketConfig::default().read_buffer_size(READ_BUFFER);
        // No message waits for the acknowledgement of another: the last one, Leave, could be lost with
        // the end of the socket.
        const NO_DELAY: bool = true;
        let connector = match url.starts_with("wss:") {
            true => {
                let connector = tls::connector().await;
                Some(connector.map_err(|error| TransportError::Connection(error.to_string()))?)
            }
            false => None,
        };
        let connecting = connect_async_tls_with_config(request, Some(config), NO_DELAY, connector);
        let (socket, _) = timeout(Duration::from_millis(timeout_ms), connecting)
            .await
            .map_err(|_| TransportError::Timeout)?
            .map_err(|error| match error {
                Error::Http(response) => TransportError::Http {
                    status: response.status().as_u16(),
                },
                other => failed(&other),
            })?;
        let (writer, reader) = socket.split();
        let connection = Arc::new(Connection {
            writer: writer.into(),
            reader: reader.into(),
        });
        Ok(WsConnectResult { connection })
    }
}

/// As `livekit-net` decides it.
fn has_proxy(url: &str) -> bool {
    let names = match url.starts_with("wss:") {
        true => ["HTTPS_PROXY", "https_proxy"],
        false => ["HTTP_PROXY", "http_proxy"],
    };
    let proxy = names.into_iter().find_map(|name| env::var(name).ok());
    proxy.is_some_and(|proxy| !proxy.is_empty())
}

fn request(url: &str, headers: &[Header]) -> Result<Request<()>, TransportError> {
    let mut request = url.into_client_request().map_err(|error| failed(&error))?;
    for Header { name, value } in headers {
        let header = name.parse::<HeaderName>().ok();
        let Some((name, mut value)) = header.zip(HeaderValue::from_str(value).ok()) else {
            return Err(TransportError::Other(format!("bad header {name}")));
        };
        value.set_sensitive(true);
        request.headers_mut().insert(name, value);
    }
    Ok(request)
}

fn failed(error: &Error) -> TransportError {
    TransportError::Connection(error.to_string())
}

struct Connection {
    writer: Mutex<SplitSink<Socket, Message>>,
    reader: Mutex<SplitStream<Socket>>,
}

#[async_trait::async_trait]
impl WsConnection for Connection {
    async fn send(&self, frame: Vec<u8>) -> Result<(), TransportError> {
        let sent = self.writer.lock().await.send(Message::binary(frame)).await;
        sent.map_err(|error| failed(&error))
    }

    /// Cancel safe.
    async fn recv(&self) -> Result<Option<Vec<u8>>, TransportError> {
        let mut reader = self.reader.lock().await;
        loop {
            match reader.next().await {
                Some(Ok(Message::Binary(frame))) => return Ok(Some(frame.into())),
                // The library answers pings by itself, with the next read.
                Some(Ok(
                    Message::Ping(_) | Message::Pong(_) | Message::Text(_) | Message::Frame(_),
                )) => {}
                Some(Ok(Message::Close(_)))
                | Some(Err(
                    Error::ConnectionClosed
                    | Error::AlreadyClosed
                    | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake),
                ))
                | None => return Ok(None),
                // The end of TLS without a word.
                Some(Err(Error::Io(error))) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(None);
                }
                Some(Err(error)) => return Err(failed(&error)),
            }
        }
    }

    async fn close(&self) {
        let _ = self.writer.lock().await.close().await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio_tungstenite::{accept_async, tungstenite::Bytes};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    async fn pair() -> (WebSocketStream<TcpStream>, Arc<dyn WsConnection>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let url = format!("ws://{}", listener.local_addr().expect("address"));
        let client = Client {
            native: livekit_net::testing::native_ws_client(),
        };
        let connecting = client.connect(url, Vec::new(), LIMIT.as_millis() as u64);
        let accepting = async {
            let (tcp, _) = listener.accept().await.expect("connection");
            accept_async(tcp).await.expect("handshake")
        };
        let (connected, server) = tokio::join!(connecting, accepting);
        (server, connected.expect("connected").connection)
    }

    #[tokio::test]
    async fn frames_of_all_lengths_pass_whole_and_in_order() {
        let (mut server, client) = pair().await;
        let lengths = [0, 1, READ_BUFFER, READ_BUFFER + 1, 3 << 20, 5];
        let frames = lengths.map(|length| {
            let bytes = (0..length).map(|n| (n % 251) as u8);
            bytes.collect::<Vec<u8>>()
        });
        let sending = async {
            for frame in &frames {
                let sent = server.send(Message::binary(frame.clone())).await;
                sent.expect("sent");
            }
        };
        let receiving = async {
            for frame in &frames {
                let received = client.recv().await.expect("no failure");
                assert!(received.as_ref() == Some(frame), "{} bytes", frame.len());
            }
        };
        let both = async { tokio::join!(sending, receiving) };
        timeout(LIMIT, both).await.expect("in time");
        let long = vec![7; 1 << 20];
        let (sent, received) = tokio::join!(client.send(long.clone()), server.next());
        sent.expect("sent");
        let received = received.expect("a message").expect("no failure");
        assert!(received.into_data() == long);
    }

    #[tokio::test]
    async fn pings_are_answered_and_a_close_is_the_end() {
        let (mut server, client) = pair().await;
        let ping = Message::Ping(Bytes::from_static(b"ping"));
        server.send(ping).await.expect("sent");
        let frame = Message::binary(vec![1]);
        server.send(frame).await.expect("sent");
        let received = client.recv().await.expect("no failure");
        assert_eq!(received, Some(vec![1]));
        let reading = async {
            let end = client.recv().await;
            client.close().await;
            end
        };
        let closing = async {
            let pong = server.next().await;
            assert!(matches!(pong, Some(Ok(Message::Pong(data))) if data[..] == *b"ping"));
            server.close(None).await.expect("closing");
            while server.next().await.is_some() {}
        };
        let both = async { tokio::join!(reading, closing) };
        let (end, ()) = timeout(LIMIT, both).await.expect("in time");
        assert!(matches!(end, Ok(None)));
    }

    #[tokio::test]
    async fn a_refusal_has_its_status() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let url = format!("ws://{}", listener.local_addr().expect("address"));
        let client = Client {
            native: livekit_net::testing::native_ws_client(),
        };
        let connecting = client.connect(url, Vec::new(), LIMIT.as_millis() as u64);
        let refusing = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut tcp, _) = listener.accept().await.expect("connection");
            let mut request = [0; 1024];
            let _ = tcp.read(&mut request).await.expect("a request");
            let answer = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n";
            tcp.write_all(answer).await.expect("written");
            tcp
        };
        let (refused, _tcp) = tokio::join!(connecting, refusing);
        assert!(matches!(refused, Err(TransportError::Http { status: 401 })));
    }
}
