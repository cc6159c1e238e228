//! Deepgram's management API: what was used, what is left, and short-lived tokens.

mod stt_client;

use rehearsal::stt::{Config, DEFAULT_PROJECT_ID, Server};
use serde_json::{Value, json};
use stt_client::*;

const QUERY: &str = "encoding=linear16&sample_rate=16000&model=nova-3&tag=room";

fn start(config: Config) -> Server {
    // However slow the machine is, no stream is to time out.
    Server::start(config.idle_timeout(LIMIT * 10)).expect("a server")
}

fn key(server: &Server) -> String {
    format!("Token {}", server.api_key())
}

/// What the API answers about the project.
async fn ask(server: &Server, what: &str) -> Value {
    let path = format!("/v1/projects/{}{what}", server.project_id());
    let (status, body) = http(server, "GET", &path, &key(server), "").await;
    assert_eq!(status, 200, "{body}");
    body
}

/// Streams so much silence; the request id.
async fn stream(server: &Server, seconds: f64) -> String {
    let mut client = Client::connect(server, QUERY).await;
    let audio = bytes(&silence(seconds, 16_000));
    client.send_audio_in(&audio, 32_000).await;
    let ended = client.close_stream().await;
    all_ended(server).await;
    ended.request_id
}

#[tokio::test]
async fn streams_draw_the_balance_down_until_new_ones_are_refused() {
    let server = start(Config::default().balance(0.05).usd_per_minute(0.6));
    let amount = async || ask(&server, "/balances").await["balances"][0]["amount"].clone();
    assert_eq!(amount().await, 0.05);
    stream(&server, 2.0).await;
    let left = amount().await.as_f64().expect("a number");
    assert!((left - 0.03).abs() < 1e-9, "{left}");
    // A stream that runs may overdraw it.
    stream(&server, 4.0).await;
    assert_eq!(amount().await, 0.0);

    let (response, body) = refused(&server, QUERY, server.api_key()).await;
    assert_eq!(response.status(), 402);
    assert_eq!(body["err_code"], "ASR_PAYMENT_REQUIRED");
    assert_eq!(server.witness().rejected[&402], 1);
    // The wrong key is told nothing of the balance.
    let (response, _) = refused(&server, QUERY, "wrong").await;
    assert_eq!(response.status(), 401);
    server.shutdown().await;
}

#[tokio::test]
async fn usage_and_requests_are_what_the_server_saw() {
    let server = start(Config::default());
    let first = stream(&server, 3.6).await;
    let second = stream(&server, 7.2).await;
    let running = Client::connect(&server, QUERY).await;

    let projects = http(&server, "GET", "/v1/projects", &key(&server), "")
        .await
        .1;
    assert_eq!(projects["projects"][0]["project_id"], DEFAULT_PROJECT_ID);
    let usage = ask(&server, "/usage").await;
    let results = usage["results"].as_array().expect("results");
    let sum = |what: &str| results.iter().filter_map(|r| r[what].as_f64()).sum::<f64>();
    assert!((sum("hours") - 0.003).abs() < 1e-9, "{usage}");
    // The running one, too.
    assert_eq!(sum("requests"), 3.0);
    let breakdown = ask(&server, "/usage/breakdown?grouping=models").await;
    assert_eq!(
        breakdown["results"][0]["grouping"]["models"],
        json!(["nova-3"])
    );

    let requests = ask(&server, "/requests").await;
    assert_eq!(
        (&requests["page"], &requests["limit"]),
        (&json!(0), &json!(10))
    );
    let listed = requests["requests"].as_array().expect("requests");
    let ids: Vec<_> = listed.iter().map(|r| r["request_id"].as_str()).collect();
    assert_eq!(ids, [Some(second.as_str()), Some(first.as_str())]);
    let details = &listed[0]["response"]["details"];
    assert_eq!(details["duration"], 7.2);
    assert_eq!(details["method"], "streaming");
    assert_eq!(details["tags"], json!(["room"]));
    assert_eq!(details["config"]["model"], "nova-3");
    let one = ask(&server, &format!("/requests?request_id={first}&limit=1")).await;
    assert_eq!(one["requests"][0]["request_id"], first.as_str());
    let shown = ask(&server, &format!("/requests/{first}")).await;
    assert_eq!(shown["request"]["response"]["details"]["duration"], 3.6);
    let past = ask(&server, "/usage?start=2020-01-01&end=2020-01-02").await;
    assert_eq!(past["results"], json!([]));
    running.close_stream().await;
    server.shutdown().await;
}

#[tokio::test]
async fn the_api_needs_the_key_a_known_project_and_sensible_parameters() {
    let server = start(Config::default());
    let project = format!("/v1/projects/{DEFAULT_PROJECT_ID}");
    let good = key(&server);
    for (path, authorization, status) in [
        ("/v1/projects".to_owned(), "Token wrong", 401),
        (format!("{project}/balances"), "Basic x", 401),
        ("/v1/projects/other/balances".to_owned(), &good, 404),
        (format!("{project}/balances/other"), &good, 404),
        (format!("{project}/requests/other"), &good, 404),
        (format!("{project}/usage?start=soon"), &good, 400),
        (format!("{project}/requests?limit=0"), &good, 400),
        (format!("{project}/requests?page=-1"), &good, 400),
        (
            format!("{project}/usage/breakdown?grouping=mood"),
            &good,
            400,
        ),
    ] {
        let (answered, body) = http(&server, "GET", &path, authorization, "").await;
        assert_eq!(answered, status, "{path}");
        assert!(body["err_msg"].is_string(), "{path}: {body}");
        if let (400, Some((_, parameter))) = (status, path.split_once('?')) {
            let name = parameter.split('=').next().expect("a name");
            let message = body["err_msg"].as_str().expect("text");
            assert!(message.contains(name), "{message}");
        }
    }
    server.shutdown().await;
}

#[tokio::test]
async fn granted_tokens_open_streams_as_bearers_and_may_not_use_the_api() {
    let server = start(Config::default());
    let grant =
        async |body: &str| http(&server, "POST", "/v1/auth/grant", &key(&server), body).await;
    let (status, granted) = grant("").await;
    assert_eq!((status, &granted["expires_in"]), (200, &json!(30.0)));
    let token = granted["access_token"].as_str().expect("a token");
    let bearer = format!("Bearer {token}");
    let opened = connect_as(&server, QUERY, &bearer).await;
    let (ws, response) = opened.expect("a stream");
    let request_id = response.headers()["dg-request-id"]
        .to_str()
        .expect("text")
        .to_owned();
    Client { ws, request_id }.close_stream().await;
    let refused = connect_as(&server, QUERY, &format!("Token {token}")).await;
    assert!(refused.is_err());
    for (method, path) in [("GET", "/v1/projects"), ("POST", "/v1/auth/grant")] {
        let (status, body) = http(&server, method, path, &bearer, "").await;
        assert_eq!(status, 403, "{path}");
        assert_eq!(body["err_code"], "INSUFFICIENT_PERMISSIONS");
    }
    let (_, short) = grant(r#"{"ttl_seconds": 2}"#).await;
    assert_eq!(short["expires_in"], 2.0);
    for bad in [r#"{"ttl_seconds": 0}"#, r#"{"ttl_seconds": "soon"}"#, "{"] {
        let (status, body) = grant(bad).await;
        assert_eq!(status, 400, "{bad}");
        assert!(body["err_msg"].is_string());
    }
    server.shutdown().await;
}

#[tokio::test]
async fn a_granted_token_expires() {
    let server = start(Config::default());
    let (_, granted) = http(
        &server,
        "POST",
        "/v1/auth/grant",
        &key(&server),
        r#"{"ttl_seconds": 1}"#,
    )
    .await;
    let bearer = format!(
        "Bearer {}",
        granted["access_token"].as_str().expect("a token")
    );
    let until_refused = async {
        while let Ok((ws, _)) = connect_as(&server, QUERY, &bearer).await {
            let request_id = String::new();
            Client { ws, request_id }.close_stream().await;
        }
    };
    tokio::time::timeout(LIMIT, until_refused)
        .await
        .expect("it expires");
    assert_eq!(server.witness().rejected[&401], 1);
    server.shutdown().await;
}
