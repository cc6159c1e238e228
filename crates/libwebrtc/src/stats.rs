//! The statistics types of the API, with the genuine crate's names, and those of
//! <https://www.w3.org/TR/webrtc-stats/>. What this engine does not know (all that is about video, for
//! one) stays zero or empty. Certificates, playout and streams are never reported.

use std::collections::HashMap;

use crate::data_channel::DataChannelState;

/// One object of a report. Their ids are unique within it.
#[derive(Debug, Clone)]
pub enum RtcStats {
    Codec(CodecStats),
    InboundRtp(InboundRtpStats),
    OutboundRtp(OutboundRtpStats),
    RemoteInboundRtp(RemoteInboundRtpStats),
    RemoteOutboundRtp(RemoteOutboundRtpStats),
    MediaSource(MediaSourceStats),
    MediaPlayout(MediaPlayoutStats),
    PeerConnection(PeerConnectionStats),
    DataChannel(DataChannelStats),
    Transport(TransportStats),
    CandidatePair(CandidatePairStats),
    LocalCandidate(LocalCandidateStats),
    RemoteCandidate(RemoteCandidateStats),
    Certificate(CertificateStats),
    Stream(StreamStats),
    /// Obsolete.
    Track,
}

#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub enum QualityLimitationReason {
    #[default]
    None,
    Cpu,
    Bandwidth,
    Other,
}

#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub enum IceRole {
    #[default]
    Unknown,
    Controlling,
    Controlled,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum DtlsTransportState {
    New,
    Connecting,
    Connected,
    Closed,
    Failed,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceTransportState {
    New,
    Checking,
    Connected,
    Completed,
    Disconnected,
    Failed,
    Closed,
}

#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub enum DtlsRole {
    Client,
    Server,
    #[default]
    Unknown,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceCandidatePairState {
    Frozen,
    Waiting,
    InProgress, // in-progress
    Failed,
    Succeeded,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceCandidateType {
    Host,
    Srflx,
    Prflx,
    Relay,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceServerTransportProtocol {
    Udp,
    Tcp,
    Tls,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceTcpCandidateType {
    Active,
    Passive,
    So,
}

/// Structs with public fields, by type, which all start empty.
macro_rules! dictionaries {
    ($($(#[$doc:meta])* $name:ident { $($type:ty: $($field:ident),+;)+ })+) => {
        $($(#[$doc])*
        #[derive(Debug, Default, Clone)]
        pub struct $name {
            $($(pub $field: $type,)+)+
        })+
    };
}

dictionaries! {
    CodecStats {
        dictionaries::RtcStats: rtc;
        dictionaries::CodecStats: codec;
    }
    InboundRtpStats {
        dictionaries::RtcStats: rtc;
        dictionaries::RtpStreamStats: stream;
        dictionaries::ReceivedRtpStreamStats: received;
        dictionaries::InboundRtpStreamStats: inbound;
    }
    OutboundRtpStats {
        dictionaries::RtcStats: rtc;
        dictionaries::RtpStreamStats: stream;
        dictionaries::SentRtpStreamStats: sent;
        dictionaries::OutboundRtpStreamStats: outbound;
    }
    RemoteInboundRtpStats {
        dictionaries::RtcStats: rtc;
        dictionaries::RtpStreamStats: stream;
        dictionaries::ReceivedRtpStreamStats: received;
        dictionaries::RemoteInboundRtpStreamStats: remote_inbound;
    }
    RemoteOutboundRtpStats {
        dictionaries::RtcStats: rtc;
        dictionaries::RtpStreamStats: stream;
        dictionaries::SentRtpStreamStats: sent;
        dictionaries::RemoteOutboundRtpStreamStats: remote_outbound;
    }
    MediaSourceStats {
        dictionaries::RtcStats: rtc;
        dictionaries::MediaSourceStats: source;
        dictionaries::AudioSourceStats: audio;
        dictionaries::VideoSourceStats: video;
    }
    MediaPlayoutStats {
        dictionaries::RtcStats: rtc;
        dictionaries::AudioPlayoutStats: audio_playout;
    }
    PeerConnectionStats {
        dictionaries::RtcStats: rtc;
        dictionaries::PeerConnectionStats: pc;
    }
    DataChannelStats {
        dictionaries::RtcStats: rtc;
        dictionaries::DataChannelStats: dc;
    }
    TransportStats {
        dictionaries::RtcStats: rtc;
        dictionaries::TransportStats: transport;
    }
    CandidatePairStats {
        dictionaries::RtcStats: rtc;
        dictionaries::CandidatePairStats: candidate_pair;
    }
    LocalCandidateStats {
        dictionaries::RtcStats: rtc;
        dictionaries::IceCandidateStats: local_candidate;
    }
    RemoteCandidateStats {
        dictionaries::RtcStats: rtc;
        dictionaries::IceCandidateStats: remote_candidate;
    }
    CertificateStats {
        dictionaries::RtcStats: rtc;
        dictionaries::CertificateStats: certificate;
    }
    StreamStats {
        dictionaries::RtcStats: rtc;
        dictionaries::StreamStats: stream;
    }
}

#[derive(Debug, Default, Clone)]
pub struct TrackStats {}

/// What the objects are made of, as in the specification.
pub mod dictionaries {
    use super::*;

    dictionaries! {
        /// Common to all. `timestamp` is in microseconds since the Unix epoch.
        RtcStats {
            String: id;
            i64: timestamp;
        }
        CodecStats {
            u32: payload_type, clock_rate, channels;
            String: transport_id, mime_type, sdp_fmtp_line;
        }
        RtpStreamStats {
            u32: ssrc;
            String: kind, transport_id, codec_id;
        }
        /// `packets_lost` counts late ones until they come; `jitter` is in seconds.
        ReceivedRtpStreamStats {
            u64: packets_received;
            i64: packets_lost;
            f64: jitter;
        }
        /// Counts of samples are at 48 kHz, of the stream that decoded last; 0 if none decodes. Durations are
        /// in seconds, `last_packet_received_timestamp` in milliseconds since the Unix epoch. `audio_level`
        /// is from 0 to 1; if nothing is decoded, it is what the sender told. `jitter_buffer_delay` is summed
        /// over the emitted samples.
        InboundRtpStreamStats {
            String: track_identifier, mid, remote_id, decoder_implementation, playout_id;
            u32: frames_decoded, key_frames_decoded, frames_rendered, frames_dropped, frame_width,
                frame_height, pause_count, freeze_count, nack_count, fir_count, pli_count,
                rtx_ssrc, fec_ssrc;
            f64: frames_per_second, total_decode_time, total_inter_frame_delay,
                total_squared_inter_frame_delay, total_pause_duration, total_freeze_duration,
                last_packet_received_timestamp, total_processing_delay,
                estimated_playout_timestamp, jitter_buffer_delay, jitter_buffer_target_delay,
                jitter_buffer_minimum_delay, audio_level, total_audio_energy,
                total_samples_duration, total_assembly_time;
            u64: qp_sum, header_bytes_received, packets_discarded, fec_bytes_received,
                fec_packets_received, fec_packets_discarded, bytes_received,
                jitter_buffer_emitted_count, total_samples_received, concealed_samples,
                silent_concealed_samples, concealment_events, inserted_samples_for_deceleration,
                removed_samples_for_acceleration, frames_received,
                frames_assembled_from_multiple_packets, retransmitted_packets_received,
                retransmitted_bytes_received;
            bool: power_efficient_decoder;
        }
        SentRtpStreamStats {
            u64: packets_sent, bytes_sent;
        }
        /// `target_bitrate` is in bits per second; 0 if packets come encoded.
        OutboundRtpStreamStats {
            String: mid, media_source_id, remote_id, rid, encoder_implementation, scalibility_mode;
            u64: header_bytes_sent, retransmitted_packets_sent, retransmitted_bytes_sent,
                total_encoded_bytes_target, qp_sum;
            u32: rtx_ssrc, frame_width, frame_height, frames_sent, huge_frames_sent,
                frames_encoded, key_frames_encoded, quality_limitation_resolution_changes,
                nack_count, fir_count, pli_count;
            f64: target_bitrate, frames_per_second, total_encode_time, total_packet_send_delay;
            QualityLimitationReason: quality_limitation_reason;
            HashMap<String, f64>: quality_limitation_durations;
            bool: power_efficient_encoder, active;
        }
        /// What the receiver reported. `round_trip_time` in seconds, `fraction_lost` from 0 to 1.
        RemoteInboundRtpStreamStats {
            String: local_id;
            f64: round_trip_time, total_round_trip_time, fraction_lost;
            u64: round_trip_time_measurements;
        }
        /// What the sender reported.
        RemoteOutboundRtpStreamStats {
            String: local_id;
            f64: remote_timestamp, round_trip_time, total_round_trip_time;
            u64: reports_sent, round_trip_time_measurements;
        }
        MediaSourceStats {
            String: track_identifier, kind;
        }
        /// `audio_level` is from 0 to 1, of the last packet.
        AudioSourceStats {
            f64: audio_level, total_audio_energy, total_samples_duration, echo_return_loss,
                echo_return_loss_enhancement, dropped_samples_duration, total_capture_delay;
            u32: dropped_samples_events;
            u64: total_samples_captured;
        }
        VideoSourceStats {
            u32: width, height, frames;
            f64: frames_per_second;
        }
        AudioPlayoutStats {
            String: kind;
            f64: synthesized_samples_duration, total_samples_duration, total_playout_delay;
            u32: synthesized_samples_events;
            u64: total_samples_count;
        }
        PeerConnectionStats {
            u32: data_channels_opened, data_channels_closed;
        }
        DataChannelStats {
            String: label, protocol;
            i32: data_channel_identifier;
            Option<DataChannelState>: state;
            u32: messages_sent, messages_received;
            u64: bytes_sent, bytes_received;
        }
        TransportStats {
            u64: packets_sent, packets_received, bytes_sent, bytes_received;
            IceRole: ice_role;
            String: ice_local_username_fragment, selected_candidate_pair_id, local_certificate_id,
                remote_certificate_id, tls_version, dtls_cipher, srtp_cipher;
            Option<DtlsTransportState>: dtls_state;
            Option<IceTransportState>: ice_state;
            DtlsRole: dtls_role;
            u32: selected_candidate_pair_changes;
        }
        /// Round-trip times in seconds, timestamps in milliseconds since the Unix epoch.
        CandidatePairStats {
            String: transport_id, local_candidate_id, remote_candidate_id;
            Option<IceCandidatePairState>: state;
            bool: nominated;
            u64: packets_sent, packets_received, bytes_sent, bytes_received, requests_received,
                requests_sent, responses_received, responses_sent, consent_requests_sent,
                bytes_discarded_on_send;
            f64: last_packet_sent_timestamp, last_packet_received_timestamp, total_round_trip_time,
                current_round_trip_time, available_outgoing_bitrate, available_incoming_bitrate;
            u32: packets_discarded_on_send;
        }
        IceCandidateStats {
            String: transport_id, address, protocol, url, foundation, related_address,
                username_fragment;
            i32: port, priority, related_port;
            Option<IceCandidateType>: candidate_type;
            Option<IceServerTransportProtocol>: relay_protocol;
            Option<IceTcpCandidateType>: tcp_type;
            Option<String>: network_type;
        }
        CertificateStats {
            String: fingerprint, fingerprint_algorithm, base64_certificate, issuer_certificate_id;
        }
        StreamStats {
            String: id, stream_identifier;
        }
    }
}
