//! Writing a file so that its name always leads to a whole file, old or new.
//!
//! The bytes go to a temporary file in the same folder, reach the disk, and only then take the name over by a
//! rename, which file systems do in one step. A crash or a full disk leaves the previous file as it was.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::FormatError;

/// Writes `path` through `write`; on any error the previous file, if there was one, is untouched.
///
/// The new file gets the permissions that the process's umask gives to new files.
///
/// # Errors
/// When the temporary file cannot be created, written, flushed or renamed.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FormatError> {
    let (temporary, file) = create_beside(path).map_err(FormatError::io(path, "create"))?;
    let written = fill(file, write).and_then(|()| std::fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one to report; a leftover temporary file harms nothing.
        let _ = std::fs::remove_file(&temporary);
        return Err(FormatError::io(path, "write")(error));
    }
    sync_folder(folder_of(path)).map_err(FormatError::io(path, "flush the folder of"))
}

/// Writes a text file atomically (see [`write_atomic`]).
///
/// # Errors
/// As [`write_atomic`].
pub fn write_text(path: &Path, text: &str) -> Result<(), FormatError> {
    write_atomic(path, |file| file.write_all(text.as_bytes()))
}

fn fill(file: File, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    write(&mut writer)?;
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// A new hidden file next to `path`, named so that neither another thread nor another process picks it too.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"))?
        .to_string_lossy();
    loop {
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{name}.{}-{unique}.tmp", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            // Left behind by a process that had this id before.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes a rename in `folder` durable. Only Unix lets a folder be opened and flushed.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_previous_file_and_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        write_text(&path, "first").unwrap();
        let error = write_atomic(&path, |file| {
            file.write_all(b"half of the sec")?;
            Err(io::Error::new(io::ErrorKind::StorageFull, "disk full"))
        })
        .unwrap_err();
        assert!(error.to_string().contains("state.json: cannot write: disk full"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(names_in(folder.path()), ["state.json"]);
    }

    #[test]
    fn a_write_replaces_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_text(&path, "a longer first text").unwrap();
        write_text(&path, "short").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
        assert_eq!(names_in(folder.path()), ["a.txt"]);
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_text(&folder.path().join("absent/a.txt"), "x").unwrap_err();
        assert!(error.to_string().contains("a.txt: cannot create"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_has_the_mode_that_the_umask_gives() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        write_text(&folder.path().join("ours"), "x").unwrap();
        std::fs::write(folder.path().join("plain"), "x").unwrap();
        assert_eq!(mode("ours"), mode("plain"));
    }
}
