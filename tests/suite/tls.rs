//! The provider behind TLS, as in production: a proxy of the test's own ends it before the STT server.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, KeyPair};
use rehearsal::stt;
use roomwarden::cli::EXIT_OK;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use crate::stage::{Binary, Stage};

const PEOPLE: usize = 12;

/// A certificate for localhost that vouches for itself; as PEM, and what serves by it.
fn certified() -> (String, TlsAcceptor) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(["localhost".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("signed");
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .expect("a certificate");
    let body = STANDARD.encode(certificate.der());
    let pem = format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
    (pem, TlsAcceptor::from(Arc::new(config)))
}

struct Proxy {
    port: u16,
    /// By what it is known from now on.
    acceptor: Arc<Mutex<TlsAcceptor>>,
    tries: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Proxy {
    async fn before(server: &stt::Server, acceptor: TlsAcceptor) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (acceptor, tries) = (
            Arc::new(Mutex::new(acceptor)),
            Arc::<AtomicUsize>::default(),
        );
        let (current, counted, server) = (acceptor.clone(), tries.clone(), server.address());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let acceptor = current.lock().expect("no panic").clone();
                connections.spawn(async move {
                    let Ok(mut tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    let mut plain = TcpStream::connect(server).await.expect("the STT server");
                    // Its end, in either direction, is the other's.
                    let _ = tokio::io::copy_bidirectional(&mut tls, &mut plain).await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            port,
            acceptor,
            tries,
            _task: task,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_is_transcribed_once_the_certificate_is_a_good_one() {
    let stage = Stage::new().await;
    let ((trusted, good), (_, bad)) = (certified(), certified());
    let proxy = Proxy::before(&stage.stt, bad).await;
    let file = stage.state.path().join("trusted.pem");
    std::fs::write(&file, trusted).expect("written");
    let url = format!("wss://localhost:{}", proxy.port);
    let mut binary = Binary::run(
        &stage,
        &[
            ("SSL_CERT_FILE", file.to_str().expect("UTF-8")),
            ("ROOMWARDEN__STT__URL", &url),
            ("ROOMWARDEN__STT__RETRY_MOST_MS", "1000"),
        ],
    );
    let mut people = Vec::new();
    for n in 0..PEOPLE {
        people.push(stage.speaker("r", &format!("speaker-{n}")).await);
    }
    binary.logged("no secure connection").await;
    // Not a storm of them: one try for all, now and then.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let tries = proxy.tries.load(Ordering::Relaxed);
    println!("{tries} tries of {PEOPLE} people");
    assert!(tries <= 3 * PEOPLE, "{tries}");
    assert_eq!(stage.stt.witness().opened, 0);

    *proxy.acceptor.lock().expect("no panic") = good;
    stage.streaming(PEOPLE).await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.all_acknowledged(PEOPLE).await;
    for speaker in people {
        speaker.leave().await;
    }
    stage.end().await;
}
