use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use safetensors::SafeTensors;

use super::*;

/// A file with this header (as long as it is) and this much data.
fn file(header: impl AsRef<[u8]>, data_len: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend((0..data_len).map(|i| (i * 37) as u8));
    bytes
}

fn parse(bytes: Vec<u8>) -> Result<SafetensorsFile, String> {
    SafetensorsFile::parse(Path::new("folder/x.safetensors"), Bytes::new(bytes))
        .map_err(|error| error.to_string())
}

/// Two F32 tensors and one BF16 in an order of their own, metadata and padding.
fn valid() -> Vec<u8> {
    file(
        r#"{"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},"__metadata__":{"format":"pt","k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"c":{"dtype":"BF16","shape":[1,2],"data_offsets":[32,36]}}    "#,
        36,
    )
}

#[test]
fn a_valid_file_gives_its_tensors_in_the_order_of_their_data() {
    let file = parse(valid()).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(file.shape("b"), Some(&[2, 3][..]));
    assert_eq!((file.shape("d"), file.contains("d"), file.contains("a")), (None, false, true));
    assert_eq!((file.dtype("c"), file.data_len("c")), (Some(Dtype::BF16), Some(4)));
    assert_eq!(file.file_len(), valid().len());
    assert_eq!(file.metadata().get("k").map(String::as_str), Some("v"));
    let bytes = valid();
    let data = &bytes[bytes.len() - 36..];
    let b = file.tensor("b").unwrap();
    assert_eq!((b.dtype(), &b.bytes()[..]), (DType::F32, &data[8..32]));
    assert_eq!(&file.tensor("c").unwrap().bytes()[..], &data[32..]);
}

#[test]
fn an_absent_tensor_is_an_error_with_file_and_name() {
    let error = parse(valid()).unwrap().tensor("q").unwrap_err().to_string();
    assert_eq!(error, "folder/x.safetensors: tensor `q`: not in this file");
}

#[test]
fn other_dtypes_are_legal_and_refused_only_when_asked_for() {
    for (name, bytes) in [
        ("BOOL", 1),
        ("U8", 1),
        ("I8", 1),
        ("F8_E5M2", 1),
        ("F8_E4M3", 1),
        ("F8_E8M0", 1),
        ("I16", 2),
        ("U16", 2),
        ("I32", 4),
        ("U32", 4),
        ("F64", 8),
        ("I64", 8),
        ("U64", 8),
        ("C64", 8),
    ] {
        let header = format!(r#"{{"w":{{"dtype":"{name}","shape":[3],"data_offsets":[0,{}]}}}}"#, bytes * 3);
        let file = parse(file(header, bytes * 3)).unwrap();
        assert_eq!(file.shape("w"), Some(&[3][..]));
        let error = file.tensor("w").unwrap_err().to_string();
        assert!(error.contains("tensor `w`") && error.contains(name), "{error}");
    }
}

#[test]
fn zero_sized_tensors_and_scalars_are_legal() {
    let header = r#"{"z":{"dtype":"F32","shape":[0,5],"data_offsets":[4,4]},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let file = parse(file(header, 4)).unwrap();
    assert!(file.tensor("z").unwrap().is_empty());
    assert_eq!(file.tensor("s").unwrap().len(), 1);
    assert_eq!(parse(self::file("{}", 0)).unwrap().names().count(), 0);
}

/// One entry `w` of dtype F32 with this shape and these offsets.
fn one(shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

/// Entries `a` and `b` of one F32 each at these offsets.
fn two(a: &str, b: &str) -> String {
    let entry = |offsets: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#);
    format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b))
}

#[test]
fn every_malformed_file_is_refused_with_its_file_and_tensor() {
    let mut long_header = valid();
    long_header[..8].copy_from_slice(&200_000_000u64.to_le_bytes());
    let mut past_the_end = valid();
    past_the_end[..8].copy_from_slice(&5000u64.to_le_bytes());
    let mut truncated = valid();
    truncated.pop();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["0 bytes are too short"]),
        ("too short", vec![1, 0, 0], &["3 bytes are too short"]),
        ("header over the limit", long_header, &["200000000", "over the limit of 100000000"]),
        ("header past the end", past_the_end, &["5000 bytes reaches past the end"]),
        ("maximal header length", vec![0xff; 16], &["over the limit"]),
        ("empty header", file("", 4), &["header is empty"]),
        ("not UTF-8", file(b"{\"\xff\":1}", 0), &["not UTF-8"]),
        ("not JSON", file("{\"a\"", 0), &["header is not valid"]),
        ("leading space", file(" {}", 0), &["starts with byte 0x20"]),
        ("an array", file("[]", 0), &["starts with byte 0x5b"]),
        ("text after the object", file("{} {}", 0), &["trailing characters"]),
        ("NUL padding", file("{}\0\0", 0), &["trailing characters"]),
        ("duplicate name", file(two("[0,4]", "[4,8]").replace('b', "a"), 8), &["key `a` occurs twice"]),
        (
            "duplicate name in two spellings",
            file(two("[0,4]", "[4,8]").replace("\"b\"", "\"\\u0061\""), 8),
            &["key `a` occurs twice"],
        ),
        (
            "duplicate field",
            file(one("[1]", "[0,4]").replace("\"shape\"", "\"dtype\":\"F32\",\"shape\""), 4),
            &["tensor `w`", "key `dtype` occurs twice"],
        ),
        (
            "duplicate metadata",
            file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
            &["`__metadata__` occurs twice"],
        ),
        (
            "duplicate metadata key",
            file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0),
            &["`__metadata__`", "key `k` occurs twice"],
        ),
        ("metadata of a number", file(r#"{"__metadata__":{"k":1}}"#, 0), &["`__metadata__`", "integer `1`"]),
        ("metadata of null", file(r#"{"__metadata__":null}"#, 0), &["`__metadata__`", "object of strings"]),
        ("unknown field", file(one("[1]", "[0,4]").replace("dtype", "type"), 4), &["tensor `w`", "`type`"]),
        ("missing field", file(r#"{"w":{"dtype":"F32","shape":[1]}}"#, 4), &["tensor `w`", "`data_offsets`"]),
        ("entry of a number", file(r#"{"w":3}"#, 4), &["tensor `w`", "integer `3`"]),
        ("hole", file(two("[0,4]", "[8,12]"), 12), &["tensor `b`", "a hole: bytes 4..8"]),
        ("hole at the start", file(one("[1]", "[4,8]"), 8), &["tensor `w`", "a hole: bytes 0..4"]),
        ("overlap", file(two("[0,4]", "[2,6]"), 6), &["tensor `b`", "overlap", "before `a` ends at 4"]),
        ("same range twice", file(two("[0,4]", "[0,4]"), 4), &["tensor `b`", "overlap"]),
        ("trailing bytes", file(one("[1]", "[0,4]"), 7), &["3 trailing bytes", "`w`"]),
        ("data without tensors", file("{}", 1), &["1 trailing bytes"]),
        ("truncated", truncated, &["tensor `c`", "past the 35 bytes"]),
        ("negative offset", file(one("[1]", "[-4,0]"), 4), &["tensor `w`", "`-4`"]),
        ("negative size", file(one("[-1]", "[0,4]"), 4), &["tensor `w`", "`-1`"]),
        ("fractional size", file(one("[1.0]", "[0,4]"), 4), &["tensor `w`", "`1.0`"]),
        ("reversed offsets", file(one("[1]", "[4,0]"), 4), &["tensor `w`", "reversed data_offsets [4, 0]"]),
        ("three offsets", file(one("[1]", "[0,2,4]"), 4), &["tensor `w`"]),
        ("one offset", file(one("[1]", "[0]"), 4), &["tensor `w`"]),
        ("offset beyond u64", file(one("[1]", "[0,99999999999999999999]"), 4), &["tensor `w`"]),
        ("size against shape", file(one("[3]", "[0,4]"), 4), &["tensor `w`", "takes 12 bytes", "hold 4"]),
        ("size of a zero shape", file(one("[0]", "[0,4]"), 4), &["tensor `w`", "takes 0 bytes"]),
        ("unknown dtype", file(one("[1]", "[0,4]").replace("F32", "F31"), 4), &["tensor `w`", "F31"]),
        (
            "overflowing shape",
            file(one("[4294967296,4294967296,4294967296]", "[0,4]"), 4),
            &["tensor `w`", "overflows"],
        ),
        ("overflowing size", file(one("[2305843009213693952]", "[0,4]"), 4), &["tensor `w`", "overflows"]),
        (
            "half a byte",
            file(one("[3]", "[0,2]").replace("F32", "F4"), 2),
            &["tensor `w`", "no whole number of bytes"],
        ),
    ];
    for (what, bytes, wanted) in cases {
        let error = parse(bytes).expect_err(what);
        assert!(error.starts_with("folder/x.safetensors: "), "{what}: {error}");
        for part in wanted {
            assert!(error.contains(part), "{what}: {part:?} is not in: {error}");
        }
    }
}

/// What must hold of every accepted file, checked from what it offers.
fn assert_invariants(bytes: &[u8], file: &SafetensorsFile) {
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut end = 8 + header_len;
    for tensor in &file.tensors {
        assert_eq!(tensor.range.start, end, "hole or overlap at {}", tensor.name);
        assert!(tensor.range.end <= bytes.len(), "{} leaves the file", tensor.name);
        let bits = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize();
        assert_eq!(tensor.range.len() * 8, bits, "size of {}", tensor.name);
        if let Ok(values) = file.tensor(&tensor.name) {
            assert_eq!(&values.bytes()[..], &bytes[tensor.range.clone()]);
        }
        end = tensor.range.end;
    }
    assert_eq!(end, bytes.len(), "trailing bytes");
    assert_eq!(file.by_name.len(), file.tensors.len(), "a name occurs twice");
    // The reference reader must see the same file.
    let reference = SafeTensors::deserialize(bytes).expect("the reference reader takes what we take");
    assert_eq!(reference.len(), file.tensors.len());
    for tensor in &file.tensors {
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (tensor.dtype, tensor.shape.as_slice()));
        assert_eq!(view.data(), &bytes[tensor.range.clone()]);
    }
}

/// One damage to a file; positions are taken modulo what is there.
#[derive(Clone, Debug)]
enum Mutation {
    FlipBit {
        byte: usize,
        bit: u8,
    },
    Truncate {
        len: usize,
    },
    Append {
        bytes: Vec<u8>,
    },
    HeaderLength {
        len: u64,
    },
    /// Shifts the header's end by a few bytes.
    ShiftLength {
        by: i8,
    },
    /// Replaces the header's n-th number.
    Number {
        index: usize,
        value: String,
    },
    /// Copies a piece of the file over, or into, another place.
    Splice {
        from: usize,
        len: usize,
        to: usize,
        insert: bool,
    },
    /// Copies one entry of the header in at another's place.
    CopyEntry {
        from: usize,
        to: usize,
    },
}

fn mutations() -> impl Strategy<Value = Mutation> {
    let number = prop_oneof![
        (0u64..64).prop_map(|n| n.to_string()),
        any::<u64>().prop_map(|n| n.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        (0u32..64).prop_map(|bits| (1u128 << bits).to_string()),
        Just("1e3".to_owned()),
        Just("0.5".to_owned()),
        Just("null".to_owned()),
        Just("".to_owned()),
    ];
    prop_oneof![
        4 => (any::<usize>(), 0..8u8).prop_map(|(byte, bit)| Mutation::FlipBit { byte, bit }),
        1 => any::<usize>().prop_map(|len| Mutation::Truncate { len }),
        1 => prop::collection::vec(any::<u8>(), 1..9).prop_map(|bytes| Mutation::Append { bytes }),
        1 => any::<u64>().prop_map(|len| Mutation::HeaderLength { len }),
        1 => (-12..12i8).prop_map(|by| Mutation::ShiftLength { by }),
        6 => (any::<usize>(), number).prop_map(|(index, value)| Mutation::Number { index, value }),
        2 => (any::<usize>(), 1..40usize, any::<usize>(), any::<bool>())
            .prop_map(|(from, len, to, insert)| Mutation::Splice { from, len, to, insert }),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(from, to)| Mutation::CopyEntry { from, to }),
    ]
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::FlipBit { byte, bit } if !bytes.is_empty() => {
                let at = byte % bytes.len();
                bytes[at] ^= 1 << bit;
            }
            Self::FlipBit { .. } => {}
            Self::Truncate { len } => bytes.truncate(len % (bytes.len() + 1)),
            Self::Append { bytes: more } => bytes.extend(more),
            Self::HeaderLength { len } => set_header_len(bytes, |_| *len),
            Self::ShiftLength { by } => set_header_len(bytes, |len| len.wrapping_add_signed(i64::from(*by))),
            Self::Number { index, value } => edit_header(bytes, |header| {
                let numbers = runs(header, u8::is_ascii_digit);
                if !numbers.is_empty() {
                    header.splice(numbers[index % numbers.len()].clone(), value.bytes());
                }
            }),
            Self::Splice { from, len, to, insert } if !bytes.is_empty() => {
                let from = from % bytes.len();
                let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                let to = to % bytes.len();
                let end = if *insert { to } else { (to + piece.len()).min(bytes.len()) };
                bytes.splice(to..end, piece);
            }
            Self::Splice { .. } => {}
            Self::CopyEntry { from, to } => edit_header(bytes, |header| {
                let braces: Vec<_> = (1..header.len()).filter(|&i| header[i] == b'{').collect();
                let entries: Vec<_> = braces
                    .iter()
                    .filter_map(|&open| {
                        let close = header[open..].iter().position(|&byte| byte == b'}')?;
                        Some(open..open + close + 1)
                    })
                    .collect();
                if !entries.is_empty() {
                    let piece = header[entries[from % entries.len()].clone()].to_vec();
                    header.splice(entries[to % entries.len()].clone(), piece);
                }
            }),
        }
    }
}

fn set_header_len(bytes: &mut [u8], change: impl FnOnce(u64) -> u64) {
    if let Some(length) = bytes.first_chunk_mut::<8>() {
        *length = change(u64::from_le_bytes(*length)).to_le_bytes();
    }
}

/// Changes the header and corrects its length, so that the change is reached by the parser.
fn edit_header(bytes: &mut Vec<u8>, edit: impl FnOnce(&mut Vec<u8>)) {
    let Ok(range) = header_range(bytes) else { return };
    let mut header = bytes[range.clone()].to_vec();
    edit(&mut header);
    set_header_len(bytes, |_| header.len() as u64);
    bytes.splice(range, header);
}

fn runs(bytes: &[u8], is_member: impl Fn(&u8) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for at in (0..bytes.len()).filter(|&at| is_member(&bytes[at])) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

#[test]
fn no_mutation_panics_and_whatever_is_accepted_is_sound() {
    let zero_sized = file(
        r#"{"e":{"dtype":"F16","shape":[0],"data_offsets":[2,2]},"u":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        2,
    );
    let seeds = [valid(), zero_sized, file(two("[0,4]", "[4,8]"), 8)];
    let config = Config { cases: 120_000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::XorShift, &[7; 16]));
    let accepted = std::cell::Cell::new(0usize);
    let strategy = (0..seeds.len(), prop::collection::vec(mutations(), 1..4));
    runner
        .run(&strategy, |(seed, mutations)| {
            let mut bytes = seeds[seed].clone();
            mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
            if let Ok(file) = parse(bytes.clone()) {
                assert_invariants(&bytes, &file);
                accepted.set(accepted.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    // Neither side of the test may be empty: damage to data is accepted, damage to structure is not.
    assert!((2_000..80_000).contains(&accepted.get()), "{} of 120000 accepted", accepted.get());
}

fn tensors() -> impl Strategy<Value = Vec<(String, Tensor)>> {
    let dtype = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)];
    let tensor =
        (dtype, prop::collection::vec(0..5usize, 0..4), any::<u8>()).prop_map(|(dtype, shape, salt)| {
            let len = shape.iter().product::<usize>() * dtype.size();
            let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(salt)).collect();
            Tensor::new(dtype, shape, Bytes::new(bytes))
        });
    prop::collection::btree_map(".{1,6}", tensor, 0..6).prop_map(|map| map.into_iter().collect())
}

proptest! {
    #![proptest_config(Config { cases: 64, ..Config::default() })]

    #[test]
    fn what_is_written_is_read_back(
        tensors in tensors(),
        metadata in prop::collection::btree_map(".{0,5}", ".{0,5}", 0..3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write_safetensors(&path, &tensors, &metadata).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for file in [SafetensorsFile::open(&path).unwrap(), SafetensorsFile::read(&path).unwrap()] {
            assert_invariants(&bytes, &file);
            prop_assert_eq!(file.metadata(), &metadata);
            prop_assert_eq!(file.names().count(), tensors.len());
            for (name, tensor) in &tensors {
                let read = file.tensor(name).unwrap();
                prop_assert_eq!((read.dtype(), read.shape()), (tensor.dtype(), tensor.shape()));
                prop_assert_eq!(&read.bytes()[..], &tensor.bytes()[..]);
            }
        }
    }
}

#[test]
fn the_order_given_does_not_change_the_bytes_written() {
    let folder = tempfile::tempdir().unwrap();
    let half = Tensor::new(DType::F16, vec![3], Bytes::new(vec![1u8; 6]));
    let mut tensors = vec![
        ("b".to_owned(), Tensor::from_f32(vec![1], &[1.0])),
        ("a".to_owned(), half),
        ("c".to_owned(), Tensor::from_f32(vec![2], &[2.0, 3.0])),
    ];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("z".to_owned(), "1".to_owned())]);
    let (first, second) = (folder.path().join("1"), folder.path().join("2"));
    write_safetensors(&first, &tensors, &metadata).unwrap();
    tensors.reverse();
    write_safetensors(&second, &tensors, &metadata).unwrap();
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    let file = SafetensorsFile::open(&first).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["b", "c", "a"], "widest first, then by name");
    let aligned = |tensor: &StoredTensor| (tensor.range.start * 8).is_multiple_of(tensor.dtype.bitsize());
    assert!(file.tensors.iter().all(aligned), "{:?}", file.tensors);
}

#[test]
fn names_that_cannot_be_stored_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let tensor = Tensor::from_f32(vec![1], &[1.0]);
    for names in [["w", "w"], ["w", "__metadata__"]] {
        let tensors = names.map(|name| (name.to_owned(), tensor.clone()));
        let error = write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap_err();
        assert!(error.to_string().contains(&format!("tensor `{}`", names[1])), "{error}");
        assert!(!path.exists());
    }
}

#[test]
fn a_missing_file_is_an_error_with_its_path() {
    let error = SafetensorsFile::open(Path::new("absent.safetensors")).unwrap_err().to_string();
    assert!(error.starts_with("absent.safetensors: cannot open"), "{error}");
}

#[test]
fn an_empty_file_is_refused_and_not_mapped_blindly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.safetensors");
    std::fs::write(&path, "").unwrap();
    let error = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("too short"), "{error}");
}
