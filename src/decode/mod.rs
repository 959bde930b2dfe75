//! Finds SYNs in captured packets and says what their options are, as far as tokens and their relatives go.
//!
//! [`capture`] reads pcap and pcapng, [`syn`] a packet, [`options`] its TCP options. Everything here comes from
//! outside and may be cut short or a lie; nothing here needs a kernel or rights.

pub mod capture;
pub mod options;
pub mod syn;

#[cfg(test)]
mod tests;
