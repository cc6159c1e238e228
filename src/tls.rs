//! What TLS connections trust: the system's certificates. They are read once and not for each
//! connection, which would cost more than its handshake, and keep its sessions for the next one.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio_tungstenite::Connector;

static CONFIG: Mutex<Option<Arc<ClientConfig>>> = Mutex::new(None);

/// For one more connection.
///
/// # Errors
/// The system has no certificates; it is asked again the next time.
pub(crate) async fn connector() -> io::Result<Connector> {
    let known = CONFIG
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let config = match known {
        Some(config) => config,
        None => tokio::task::spawn_blocking(read)
            .await
            .map_err(io::Error::other)??,
    };
    Ok(Connector::Rustls(config))
}

/// Has the next connection read them anew.
pub(crate) fn forget() {
    *CONFIG.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

fn read() -> io::Result<Arc<ClientConfig>> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (taken, _) = roots.add_parsable_certificates(found.certs);
    if taken == 0 {
        let said = format!(
            "the system has no certificates to trust ({:?})",
            found.errors
        );
        return Err(io::Error::new(io::ErrorKind::NotFound, said));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let config = Arc::new(config);
    *CONFIG.lock().unwrap_or_else(PoisonError::into_inner) = Some(config.clone());
    Ok(config)
}
