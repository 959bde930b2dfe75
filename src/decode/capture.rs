//! Reads captures: pcap in every byte order and precision, and pcapng. Also one that still goes on, from a pipe.

use std::io::{self, Cursor, Read};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pcap_parser::traits::{PcapNGPacketBlock, PcapReaderIterator};
use pcap_parser::{Block, LegacyPcapReader, PcapBlockOwned, PcapError, PcapNGReader};

/// More than most blocks need; it grows with one that needs more.
const BUFFER_LEN: usize = 64 << 10;
/// A block that claims to be longer is a lie: libpcap captures packets of at most 256 KiB.
const BLOCK_LEN_MAX: usize = 1 << 20;
const PCAP_HEADER_LEN: usize = 24;
/// The type of a section header block, which reads the same in both byte orders.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
const PCAPNG_ORDER: u32 = 0x1a2b_3c4d;

/// One captured frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// As <https://www.tcpdump.org/linktypes.html> numbers them.
    pub link_type: i32,
    /// Since 1970; nothing if the capture does not say.
    pub time: Option<Duration>,
    /// As far as it was captured.
    pub bytes: &'a [u8],
}

/// Hands over every frame of a capture, in its order.
///
/// # Errors
/// It is no capture, is damaged or cut short, cannot be read, or `each` failed. Frames before the damage have been
/// handed over.
pub fn read<R: Read + Send>(mut input: R, mut each: impl FnMut(Frame<'_>) -> Result<()>) -> Result<()> {
    let (head, is_ng) = read_head(&mut input)?;
    // Its first reading has to give all of the head, which a pipe would not promise.
    let input = Steady(Cursor::new(head).chain(input));
    if is_ng { read_ng(input, &mut each) } else { read_legacy(input, &mut each) }
}

/// Reads again when a signal has interrupted it, which the parser takes for the end.
struct Steady<R>(R);

impl<R: Read> Read for Steady<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// The first header, whole, and whether it is pcapng.
fn read_head(input: &mut impl Read) -> Result<(Vec<u8>, bool)> {
    let mut head = vec![0; 12];
    let what = "it is neither pcap nor pcapng (tcpdump -w writes pcap)";
    input.read_exact(&mut head).context(what)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let is_ng = head[..4] == PCAPNG_MAGIC;
    let len = match (is_ng, word(8)) {
        (false, _) => PCAP_HEADER_LEN,
        (true, PCAPNG_ORDER) => word(4) as usize,
        (true, order) if order.swap_bytes() == PCAPNG_ORDER => word(4).swap_bytes() as usize,
        (true, _) => bail!(what),
    };
    if !(head.len()..=BUFFER_LEN / 2).contains(&len) {
        bail!("its first header claims to have {len} bytes, which is a lie");
    }
    head.resize(len, 0);
    input.read_exact(&mut head[12..]).context(what)?;
    Ok((head, is_ng))
}

fn read_legacy(input: impl Read + Send, each: &mut impl FnMut(Frame<'_>) -> Result<()>) -> Result<()> {
    let mut reader = LegacyPcapReader::new(BUFFER_LEN, input).map_err(|error| explain(&error))?;
    let (mut link_type, mut fractions) = (0, 1_000_000);
    read_blocks(&mut reader, |block| match block {
        PcapBlockOwned::LegacyHeader(header) => {
            // The upper bits may say how long a checksum at the end of each frame is.
            link_type = header.network.0 & 0xffff;
            fractions = if header.is_nanosecond_precision() { 1_000_000_000 } else { 1_000_000 };
            Ok(())
        }
        PcapBlockOwned::Legacy(frame) => {
            let nanos = u64::from(frame.ts_usec) * (1_000_000_000 / fractions);
            let time = Duration::from_secs(frame.ts_sec.into()) + Duration::from_nanos(nanos);
            each(Frame { link_type, time: Some(time), bytes: frame.data })
        }
        PcapBlockOwned::NG(_) => Ok(()),
    })
}

/// What a frame of pcapng refers to.
struct Interface {
    link_type: i32,
    /// Units a second; none if they are too many to count.
    resolution: Option<u64>,
    offset_s: i64,
}

fn read_ng(input: impl Read + Send, each: &mut impl FnMut(Frame<'_>) -> Result<()>) -> Result<()> {
    let mut reader = PcapNGReader::new(BUFFER_LEN, input).map_err(|error| explain(&error))?;
    let mut interfaces: Vec<Interface> = Vec::new();
    read_blocks(&mut reader, |block| {
        let PcapBlockOwned::NG(block) = block else { return Ok(()) };
        match block {
            Block::SectionHeader(_) => interfaces.clear(),
            Block::InterfaceDescription(interface) => interfaces.push(Interface {
                link_type: interface.linktype.0,
                resolution: interface.ts_resolution(),
                offset_s: interface.ts_offset(),
            }),
            Block::EnhancedPacket(packet) => {
                let interface = interfaces.get(packet.if_id as usize).with_context(|| {
                    format!("a frame of interface {}, which it does not describe", packet.if_id)
                })?;
                let units = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                let time = interface.time(units);
                each(Frame { link_type: interface.link_type, time, bytes: packet.packet_data() })?;
            }
            Block::SimplePacket(packet) => {
                let interface = interfaces.first().context("a frame before any interface is described")?;
                each(Frame { link_type: interface.link_type, time: None, bytes: packet.packet_data() })?;
            }
            _ => {}
        }
        Ok(())
    })
}

impl Interface {
    fn time(&self, units: u64) -> Option<Duration> {
        let resolution = self.resolution.filter(|resolution| *resolution > 0)?;
        let seconds = (units / resolution).checked_add_signed(self.offset_s)?;
        let nanos = u128::from(units % resolution) * 1_000_000_000 / u128::from(resolution);
        Some(Duration::new(seconds, nanos as u32))
    }
}

fn read_blocks(
    reader: &mut impl PcapReaderIterator,
    mut each: impl FnMut(PcapBlockOwned<'_>) -> Result<()>,
) -> Result<()> {
    let mut capacity = BUFFER_LEN;
    loop {
        let needs_more = match reader.next() {
            Ok((consumed, block)) => {
                each(block)?;
                reader.consume(consumed);
                continue;
            }
            Err(PcapError::Eof) => return Ok(()),
            Err(PcapError::Incomplete(_)) => true,
            Err(PcapError::BufferTooSmall) if capacity < BLOCK_LEN_MAX => false,
            Err(error) => return Err(explain(&error)),
        };
        if !needs_more {
            capacity *= 2;
            if !reader.grow(capacity) {
                bail!("no memory for a block of more than {} bytes", capacity / 2);
            }
        }
        let before = reader.data().len();
        reader.refill().map_err(|error| explain(&error))?;
        // A parser that asks for more where nothing more fits would ask for ever.
        if needs_more && reader.data().len() == before && !reader.reader_exhausted() {
            bail!("a block in it cannot be read");
        }
    }
}

fn explain<T>(error: &PcapError<T>) -> anyhow::Error {
    match error {
        PcapError::UnexpectedEof | PcapError::Incomplete(_) => {
            anyhow::anyhow!("it is cut short in the middle of a packet")
        }
        PcapError::ReadError => anyhow::anyhow!("it cannot be read"),
        PcapError::BufferTooSmall => {
            anyhow::anyhow!("a block in it claims to have more than {BLOCK_LEN_MAX} bytes")
        }
        PcapError::HeaderNotRecognized => anyhow::anyhow!("it is neither pcap nor pcapng"),
        _ => anyhow::anyhow!("it is damaged"),
    }
}
