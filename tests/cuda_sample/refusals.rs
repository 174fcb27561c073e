//! What does not fit is refused by name, before anything is launched.

use loramux::backend::cuda::sample::SampleWork;
use loramux::backend::cuda::{CudaError, DeviceBuffer};
use loramux::backend::sampling::{Draw, TokenSource};

use crate::harness::OnDevice;

#[track_caller]
fn assert_refused<T>(result: Result<T, CudaError>, part: &str) {
    match result {
        Err(CudaError::Shape(message)) => assert!(message.contains(part), "{message:?} has no {part:?}"),
        Err(other) => panic!("wanted a shape error with {part:?}, found {other:?}"),
        Ok(_) => panic!("wanted a shape error with {part:?}"),
    }
}

#[test]
fn vocabularies_that_sums_have_no_room_for() {
    let on = OnDevice::new();
    let refused = |draws, vocabulary, part: &str| {
        assert_refused(SampleWork::new(on.stream.device(), draws, vocabulary), part);
    };
    refused(0, 10, "0 draws from a vocabulary of 10");
    refused(1, 0, "1 draws from a vocabulary of 0");
    refused(1, (1 << 24) + 1, "a vocabulary of 16777217");
}

#[test]
fn rows_that_are_not_there() {
    let on = OnDevice::new();
    let logits = DeviceBuffer::<f32>::new(on.stream.device(), 25, "a test").expect("memory");
    let mut work = SampleWork::new(on.stream.device(), 4, 10).expect("memory");
    let mut sample = |row, stride| {
        let draws = [
            Draw { row: 0, token: TokenSource::Given(0), logprobs: None },
            Draw { row, token: TokenSource::Given(0), logprobs: None },
        ];
        work.sample(&on.stream, &on.kernels, logits.slice(..), stride, &draws, &mut Vec::new())
    };
    assert!(sample(1, 15).is_ok());
    assert_refused(sample(1, 16), "row 1 of 25 logits, 16 a row, for a vocabulary of 10");
    assert_refused(sample(2, 10), "row 2 of 25 logits, 10 a row");
    assert_refused(sample(usize::MAX, 10), "row 18446744073709551615 of 25 logits");
    assert_refused(sample(1, 9), "9 a row, for a vocabulary of 10");
}
