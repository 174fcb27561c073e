use crate::format::FormatError;
use std::path::Path;
pub const REPORT_FILE: &str = "report.html";
pub fn write_job_report(_: &Path) -> Result<(), FormatError> {
    Ok(())
}
pub fn write_run_report(_: &Path) -> Result<(), FormatError> {
    Ok(())
}
