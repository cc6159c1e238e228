//! An agent worker's websocket, in protobuf or JSON.

use super::LIMIT;
use futures_util::{SinkExt, StreamExt};
use livekit_protocol::{
    self as proto, JobStatus, JobType, WorkerStatus, server_message::Message as Answer,
    worker_message::Message as Request,
};
use livekit_token::VideoGrants;
use prost::Message as _;
use rehearsal::room::Server;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, client::IntoClientRequest},
};

pub struct Worker {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    json: bool,
    pub id: String,
}

impl Worker {
    /// Registers in protobuf.
    pub async fn register(server: &Server, job_type: JobType, name: &str) -> Self {
        Self::register_with(server, registration(job_type, name), false).await
    }

    pub async fn register_with(
        server: &Server,
        request: proto::RegisterWorkerRequest,
        json: bool,
    ) -> Self {
        let mut worker = Self::connect(server, json).await;
        worker.send(Request::Register(request)).await;
        match worker.next().await {
            Some(Answer::Register(response)) => {
                assert_eq!(response.server_info.map(|i| i.agent_protocol), Some(1));
                worker.id = response.worker_id;
            }
            other => panic!("not registered but {other:?}"),
        }
        worker
    }

    /// Opens the websocket and says nothing.
    pub async fn connect(server: &Server, json: bool) -> Self {
        let grants = VideoGrants {
            agent: true,
            ..VideoGrants::default()
        };
        let socket = open(server, grants).await.expect("websocket");
        Self {
            socket,
            json,
            id: String::new(),
        }
    }

    pub async fn send(&mut self, request: Request) {
        let message = Some(request);
        let message = proto::WorkerMessage { message };
        let frame = if self.json {
            let json = serde_json::to_string(&message).expect("json");
            tungstenite::Message::text(json)
        } else {
            tungstenite::Message::binary(message.encode_to_vec())
        };
        self.socket.send(frame).await.expect("sent");
    }

    /// The next message; None when the server has closed the websocket.
    pub async fn next(&mut self) -> Option<Answer> {
        // As a whole: the server's pings are frames too.
        timeout(LIMIT, self.read()).await.expect("message in time")
    }

    async fn read(&mut self) -> Option<Answer> {
        loop {
            let message = match self.socket.next().await? {
                Ok(tungstenite::Message::Binary(bytes)) => {
                    assert!(!self.json, "protobuf to a worker that speaks JSON");
                    proto::ServerMessage::decode(bytes).expect("protobuf")
                }
                Ok(tungstenite::Message::Text(text)) => {
                    assert!(self.json, "JSON to a worker that speaks protobuf");
                    serde_json::from_str(&text).expect("json")
                }
                Ok(tungstenite::Message::Close(_)) | Err(_) => return None,
                Ok(_) => continue,
            };
            return message.message;
        }
    }

    /// The job that the server asks about next.
    pub async fn asked(&mut self) -> proto::Job {
        match self.next().await {
            Some(Answer::Availability(request)) => request.job.expect("a job"),
            other => panic!("not asked but {other:?}"),
        }
    }

    pub async fn answer(&mut self, response: proto::AvailabilityResponse) {
        self.send(Request::Availability(response)).await;
    }

    /// Takes the next job for an agent of this identity.
    pub async fn take(&mut self, identity: &str) -> proto::JobAssignment {
        let job = self.asked().await;
        self.answer(yes(&job, identity)).await;
        match self.next().await {
            Some(Answer::Assignment(assignment)) => {
                assert_eq!(assignment.job.as_ref().map(|j| &j.id), Some(&job.id));
                assignment
            }
            other => panic!("not assigned but {other:?}"),
        }
    }

    /// The job that the server ends next.
    pub async fn terminated(&mut self) -> String {
        match self.next().await {
            Some(Answer::Termination(termination)) => termination.job_id,
            other => panic!("not terminated but {other:?}"),
        }
    }

    pub async fn report(&mut self, job: &str, status: JobStatus, error: &str) {
        let update = proto::UpdateJobStatus {
            job_id: job.to_owned(),
            status: status as i32,
            error: error.to_owned(),
        };
        self.send(Request::UpdateJob(update)).await;
    }

    /// Says how busy the worker is, and waits until the server knows.
    pub async fn status(&mut self, status: WorkerStatus, load: f32) {
        let update = proto::UpdateWorkerStatus {
            status: Some(status as i32),
            load,
            ..proto::UpdateWorkerStatus::default()
        };
        self.send(Request::UpdateWorker(update)).await;
    }
}

/// Opens a worker's websocket with a token of these grants.
pub async fn open(
    server: &Server,
    grants: VideoGrants,
) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>, Box<tungstenite::Error>> {
    let url = format!("{}/agent?protocol=1", server.url());
    let mut request = url.into_client_request().expect("request");
    let bearer = format!("Bearer {}", super::token(server, "worker", grants));
    let bearer = bearer.parse().expect("header");
    request.headers_mut().insert("authorization", bearer);
    let connecting = tokio_tungstenite::connect_async(request);
    let connected = timeout(LIMIT, connecting).await.expect("connects in time");
    connected.map(|(socket, _)| socket).map_err(Box::new)
}

pub fn registration(job_type: JobType, name: &str) -> proto::RegisterWorkerRequest {
    proto::RegisterWorkerRequest {
        r#type: job_type as i32,
        agent_name: name.to_owned(),
        version: "1.2.3".to_owned(),
        ..proto::RegisterWorkerRequest::default()
    }
}

pub fn yes(job: &proto::Job, identity: &str) -> proto::AvailabilityResponse {
    proto::AvailabilityResponse {
        job_id: job.id.clone(),
        available: true,
        participant_identity: identity.to_owned(),
        ..proto::AvailabilityResponse::default()
    }
}

pub fn no(job: &proto::Job) -> proto::AvailabilityResponse {
    proto::AvailabilityResponse {
        job_id: job.id.clone(),
        ..proto::AvailabilityResponse::default()
    }
}
