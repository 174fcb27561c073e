//! Event files that TensorBoard reads: scalars over steps.
//!
//! A file is a sequence of TFRecords, each a length and bytes with a checksum for either:
//!
//! ```text
//! u64 length   u32 mask(crc32c(length))   bytes   u32 mask(crc32c(bytes))          little-endian
//! mask(crc) = rotate_right(crc, 15) + 0xa282ead8
//! ```
//!
//! and each record is an `Event` in protobuf's encoding. Of that message four fields are needed, so they are written
//! here: the crates that know them bring a protobuf compiler or an image library along. Sources: `tensorflow/core/lib/
//! io/record_writer.h`, `tensorflow/core/util/event.proto` and `tensorflow/core/framework/summary.proto`.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::format::FormatError;

/// Of the first event of each file.
const FILE_VERSION: &str = "brain.Event:2";

/// Writes events into one new file of a folder; TensorBoard joins all files of a folder.
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Begins a file in `folder`, which is made if there is none.
    ///
    /// # Errors
    /// When the folder or the file cannot be made or written.
    pub fn create(folder: &Path) -> Result<Self, FormatError> {
        std::fs::create_dir_all(folder).map_err(FormatError::io(folder, "create the folder"))?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard knows event files by `tfevents` and reads those of a folder in the order of their names.
        let name = format!("events.out.tfevents.{:010}.{:09}", since.as_secs(), since.subsec_nanos());
        let path = folder.join(name);
        let file = (OpenOptions::new().write(true).create_new(true).open(&path))
            .map_err(FormatError::io(&path, "create"))?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        let mut event = Message::default();
        event.double(event::WALL_TIME, since.as_secs_f64());
        event.bytes(event::FILE_VERSION, FILE_VERSION.as_bytes());
        writer.write(&event)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Adds a value of the curve `tag`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<(), FormatError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.write(&scalar_event(since.as_secs_f64(), tag, step, value))
    }

    /// Hands what was added to the operating system, where TensorBoard finds it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn flush(&mut self) -> Result<(), FormatError> {
        self.file.flush().map_err(FormatError::io(&self.path, "write"))
    }

    fn write(&mut self, event: &Message) -> Result<(), FormatError> {
        self.file.write_all(&record(&event.0)).map_err(FormatError::io(&self.path, "write"))
    }
}

/// Field numbers of `Event`.
mod event {
    pub const WALL_TIME: u32 = 1;
    pub const STEP: u32 = 2;
    pub const FILE_VERSION: u32 = 3;
    pub const SUMMARY: u32 = 5;
}

/// Field numbers of `Summary` and `Summary.Value`.
mod summary {
    pub const VALUE: u32 = 1;
    pub const TAG: u32 = 1;
    pub const SIMPLE_VALUE: u32 = 2;
}

fn scalar_event(seconds: f64, tag: &str, step: u64, value: f64) -> Message {
    let mut scalar = Message::default();
    scalar.bytes(summary::TAG, tag.as_bytes());
    scalar.float(summary::SIMPLE_VALUE, value as f32);
    let mut summary = Message::default();
    summary.bytes(summary::VALUE, &scalar.0);
    let mut event = Message::default();
    event.double(event::WALL_TIME, seconds);
    event.integer(event::STEP, step);
    event.bytes(event::SUMMARY, &summary.0);
    event
}

/// A protobuf message in the making: `key = field << 3 | wire type`, then the value.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn integer(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    /// Bytes, text, or another message.
    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    /// Seven bits a byte, the lowest first; the eighth says that there are more.
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// Bytes as a TFRecord.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(bytes.len() + 16);
    record.extend(length);
    record.extend(mask(crc32c(&length)).to_le_bytes());
    record.extend(bytes);
    record.extend(mask(crc32c(bytes)).to_le_bytes());
    record
}

/// A checksum of data that holds checksums itself is weak, so TensorFlow turns and shifts those it stores.
fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C, reflected polynomial 0x82f63b78 (RFC 3720, section 12.1). Bit by bit: an event has some fifty bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of RFC 3720, appendix B.4, and of the check that catalogues of CRCs list.
    #[test]
    fn the_checksum_is_the_published_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    /// Laid out by hand from the messages' definitions.
    #[test]
    fn an_event_has_the_bytes_of_its_definition() {
        let event = scalar_event(1.5, "loss", 300, 0.25);
        let wanted = [
            &[0x09][..],
            &1.5f64.to_le_bytes(),
            &[0x10, 0xac, 0x02],
            &[0x2a, 13, 0x0a, 11, 0x0a, 4],
            b"loss",
            &[0x15],
            &0.25f32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(event.0, wanted);
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("job");
        let values = [("train/loss", 1, 2.5), ("valid/größe", 1 << 40, -0.125), ("train/loss", 2, f64::NAN)];
        let mut writer = EventWriter::create(&folder).unwrap();
        for (tag, step, value) in values {
            writer.scalar(tag, step, value).unwrap();
        }
        writer.flush().unwrap();
        // Another one of the same folder is another file.
        EventWriter::create(&folder).unwrap();
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), 2);
        assert!(files.iter().all(|file| file.to_string_lossy().contains("tfevents")));

        let events = reader::events(&std::fs::read(&files[0]).unwrap());
        assert_eq!(events.len(), 1 + values.len());
        assert_eq!(events[0].version.as_deref(), Some("brain.Event:2"));
        for (event, (tag, step, value)) in events[1..].iter().zip(values) {
            assert!(event.wall_time > 1.7e9, "seconds since 1970");
            assert_eq!(event.step, step);
            let (read_tag, read_value) = event.scalar.as_ref().unwrap();
            assert_eq!(read_tag, tag);
            assert!(f64::from(*read_value) == value || value.is_nan() && read_value.is_nan());
        }
    }

    /// Reads event files from their specification, with nothing of the code above.
    mod reader {
        #[derive(Default)]
        pub struct Event {
            pub wall_time: f64,
            pub step: u64,
            pub version: Option<String>,
            pub scalar: Option<(String, f32)>,
        }

        enum Value<'a> {
            Varint(u64),
            Fixed(&'a [u8]),
            Bytes(&'a [u8]),
        }

        /// CRC-32C from the unreflected polynomial, by polynomial division of the mirrored bits.
        fn checksum(bytes: &[u8]) -> u32 {
            let mut remainder = u32::MAX;
            for byte in bytes {
                remainder ^= u32::from(byte.reverse_bits()) << 24;
                for _ in 0..8 {
                    let carry = remainder & 0x8000_0000 != 0;
                    remainder <<= 1;
                    if carry {
                        remainder ^= 0x1edc_6f41;
                    }
                }
            }
            (remainder ^ u32::MAX).reverse_bits()
        }

        fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
            let (taken, rest) = bytes.split_at(count);
            *bytes = rest;
            taken
        }

        fn checked<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
            let taken = take(bytes, count);
            let stored = u32::from_le_bytes(take(bytes, 4).try_into().unwrap());
            let crc = stored.wrapping_sub(0xa282_ead8);
            assert_eq!(crc.rotate_left(15), checksum(taken));
            taken
        }

        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for place in 0.. {
                let byte = take(bytes, 1)[0];
                value |= u64::from(byte & 0x7f) << (7 * place);
                if byte < 0x80 {
                    break;
                }
            }
            value
        }

        fn fields(mut bytes: &[u8]) -> Vec<(u64, Value<'_>)> {
            let mut fields = Vec::new();
            while !bytes.is_empty() {
                let key = varint(&mut bytes);
                let value = match key % 8 {
                    0 => Value::Varint(varint(&mut bytes)),
                    1 => Value::Fixed(take(&mut bytes, 8)),
                    2 => {
                        let length = varint(&mut bytes) as usize;
                        Value::Bytes(take(&mut bytes, length))
                    }
                    5 => Value::Fixed(take(&mut bytes, 4)),
                    other => panic!("wire type {other}"),
                };
                fields.push((key / 8, value));
            }
            fields
        }

        fn text(bytes: &[u8]) -> String {
            String::from_utf8(bytes.to_vec()).unwrap()
        }

        pub fn events(mut bytes: &[u8]) -> Vec<Event> {
            let mut events = Vec::new();
            while !bytes.is_empty() {
                let length = u64::from_le_bytes(checked(&mut bytes, 8).try_into().unwrap());
                let mut event = Event::default();
                for field in fields(checked(&mut bytes, length as usize)) {
                    match field {
                        (1, Value::Fixed(value)) => {
                            event.wall_time = f64::from_le_bytes(value.try_into().unwrap());
                        }
                        (2, Value::Varint(step)) => event.step = step,
                        (3, Value::Bytes(version)) => event.version = Some(text(version)),
                        (5, Value::Bytes(summary)) => event.scalar = Some(scalar(summary)),
                        (number, _) => panic!("field {number} of an event"),
                    }
                }
                events.push(event);
            }
            events
        }

        fn scalar(summary: &[u8]) -> (String, f32) {
            let [(1, Value::Bytes(value))] = fields(summary)[..] else { panic!("one value") };
            let [(1, Value::Bytes(tag)), (2, Value::Fixed(value))] = fields(value)[..] else {
                panic!("a tag and a simple value")
            };
            (text(tag), f32::from_le_bytes(value.try_into().unwrap()))
        }
    }
}
