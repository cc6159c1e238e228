//! End-to-end encryption: not supported by this engine. Keys are not kept, a [`FrameCryptor`] keeps
//! its sender silent or ends its receiver's track, logs an error and reports a failure as its state,
//! [`DataPacketCryptor`] fails: nothing goes out in the clear, and nothing encrypted is taken for audio.

use crate::{
    engine, native::packet_trailer::PacketTrailerHandler,
    peer_connection_factory::PeerConnectionFactory, rtp_receiver::RtpReceiver,
    rtp_sender::RtpSender,
};

pub type OnStateChange = Box<dyn FnMut(String, EncryptionState) + Send + Sync>;

const UNSUPPORTED: &str = "end-to-end encryption is not supported by this engine";

#[derive(Copy, Clone, Debug)]
#[non_exhaustive]
pub enum KeyDerivationAlgorithm {
    PBKDF2,
    HKDF,
}

#[derive(Debug, Clone)]
pub struct KeyProviderOptions {
    pub shared_key: bool,
    pub ratchet_window_size: i32,
    pub ratchet_salt: Vec<u8>,
    pub failure_tolerance: i32,
    pub key_ring_size: i32,
    pub key_derivation_algorithm: KeyDerivationAlgorithm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncryptionAlgorithm {
    AesGcm,
    AesCbc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncryptionState {
    New,
    Ok,
    EncryptionFailed,
    DecryptionFailed,
    MissingKey,
    KeyRatcheted,
    InternalError,
}

#[derive(Debug, Clone)]
pub struct EncryptedPacket {
    pub data: Vec<u8>,
    pub iv: Vec<u8>,
    pub key_index: u32,
}

/// Refuses every key.
#[derive(Clone, Debug)]
pub struct KeyProvider {
    _private: (),
}

impl KeyProvider {
    pub fn new(_options: KeyProviderOptions) -> Self {
        log::error!("{UNSUPPORTED}");
        Self { _private: () }
    }

    pub fn set_shared_key(&self, _key_index: i32, _key: Vec<u8>) -> bool {
        false
    }

    pub fn ratchet_shared_key(&self, _key_index: i32) -> Option<Vec<u8>> {
        None
    }

    pub fn get_shared_key(&self, _key_index: i32) -> Option<Vec<u8>> {
        None
    }

    pub fn set_key(&self, _participant_id: String, _key_index: i32, _key: Vec<u8>) -> bool {
        false
    }

    pub fn ratchet_key(&self, _participant_id: String, _key_index: i32) -> Option<Vec<u8>> {
        None
    }

    pub fn get_key(&self, _participant_id: String, _key_index: i32) -> Option<Vec<u8>> {
        None
    }

    pub fn set_sif_trailer(&self, _trailer: Vec<u8>) {}
}

/// Bars its sender, or the present track of its receiver.
#[derive(Clone, Debug)]
pub struct FrameCryptor {
    participant_id: String,
    /// What became of it.
    state: EncryptionState,
}

impl FrameCryptor {
    pub fn new_for_rtp_sender(
        _factory: &PeerConnectionFactory,
        participant_id: String,
        _algorithm: EncryptionAlgorithm,
        _key_provider: KeyProvider,
        sender: RtpSender,
    ) -> Self {
        log::error!("{UNSUPPORTED}: nothing is sent, rather than in the clear");
        sender.bar();
        let state = EncryptionState::EncryptionFailed;
        Self {
            participant_id,
            state,
        }
    }

    pub fn new_for_rtp_receiver(
        _factory: &PeerConnectionFactory,
        participant_id: String,
        _algorithm: EncryptionAlgorithm,
        _key_provider: KeyProvider,
        receiver: RtpReceiver,
    ) -> Self {
        log::error!("{UNSUPPORTED}: the track of {participant_id:?} ends here");
        receiver.bar();
        let state = EncryptionState::DecryptionFailed;
        Self {
            participant_id,
            state,
        }
    }

    pub fn set_enabled(&self, _enabled: bool) {}

    pub fn enabled(&self) -> bool {
        false
    }

    pub fn set_key_index(&self, _index: i32) {}

    pub fn key_index(&self) -> i32 {
        0
    }

    pub fn participant_id(&self) -> String {
        self.participant_id.clone()
    }

    /// Called once, on a thread of the engine: encryption or decryption has failed.
    pub fn on_state_change(&self, handler: Option<OnStateChange>) {
        let (participant_id, state) = (self.participant_id.clone(), self.state);
        let told = handler.map(|mut handler| {
            // Not by the caller, which may hold locks that the handler takes.
            engine::spawn(async move { handler(participant_id, state) })
        });
        if let Some(Err(err)) = told {
            log::error!("{UNSUPPORTED}, and that can't be told: {err}");
        }
    }

    pub fn set_packet_trailer_handler(&self, _handler: &PacketTrailerHandler) {}
}

#[derive(Clone, Debug)]
pub struct DataPacketCryptor {
    _private: (),
}

impl DataPacketCryptor {
    pub fn new(_algorithm: EncryptionAlgorithm, _key_provider: KeyProvider) -> Self {
        Self { _private: () }
    }

    /// Always an error.
    pub fn encrypt(
        &self,
        _participant_id: &str,
        _key_index: u32,
        _data: &[u8],
    ) -> Result<EncryptedPacket, Box<dyn std::error::Error>> {
        Err(UNSUPPORTED.into())
    }

    /// Always an error.
    pub fn decrypt(
        &self,
        _participant_id: &str,
        _packet: &EncryptedPacket,
    ) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        Err(UNSUPPORTED.into())
    }
}
