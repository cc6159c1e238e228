//! Runs the room server until interrupted:
//! `room_server [--no-udp] [--no-v1] [port [media port [api key [secret]]]]`.
//! What it logs is chosen by `RUST_LOG`.

use rehearsal::room::{Config, Server};
use std::env;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let (flags, values): (Vec<_>, Vec<_>) = env::args().skip(1).partition(|a| a.starts_with("--"));
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let mut config = Config {
        udp: !has("--no-udp"),
        single_peer_connection: !has("--no-v1"),
        ..Config::default()
    };
    let mut values = values.into_iter();
    if let Some(port) = values.next() {
        config.port = port.parse()?;
    }
    if let Some(port) = values.next() {
        config.media_port = port.parse()?;
    }
    config.api_key = values.next().unwrap_or(config.api_key);
    config.api_secret = values.next().unwrap_or(config.api_secret);
    let server = Server::start(config)?;
    println!(
        "{} {} {}",
        server.url(),
        server.api_key(),
        server.api_secret()
    );
    tokio::signal::ctrl_c().await?;
    server.shutdown().await;
    Ok(())
}
