package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/govmm/govmm/vmm"
	"golang.org/x/sys/unix"
)

const (
	// maxKept and keptFor bound the records of a directory.
	maxKept = 1000
	keptFor = 30 * 24 * time.Hour
	// maxRecordFile bounds one of them, in bytes: a result has at most 1000 rounds.
	maxRecordFile = 1 << 20
	recordTime    = "20060102T150405.000Z"
	recordSuffix  = ".json"
)

// StateDirectory returns the directory with the records of migrations, govmm/migrations in
// $XDG_STATE_HOME. Without that variable it is in /var/lib for root, and in ~/.local/state for
// others. It returns "" if there is no such place, and creates nothing.
func StateDirectory() string {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		dir = "/var/lib"
		if os.Geteuid() != 0 {
			home, err := os.UserHomeDir()
			if err != nil {
				return ""
			}
			dir = filepath.Join(home, ".local", "state")
		}
	}
	return filepath.Join(dir, "govmm", "migrations")
}

// unitState is [StateDirectory] of the user of the units, whose home the package makes.
const unitState = "/var/lib/govmm-units/.local/state/govmm/migrations"

// RecordDirectories lists the directories with records of migrations that concern this user:
// its own and, for root, that of the VMs that units run.
func RecordDirectories() []string {
	own := StateDirectory()
	if os.Geteuid() == 0 && !filepath.IsAbs(os.Getenv("XDG_STATE_HOME")) {
		return []string{own, unitState}
	}
	return []string{own}
}

// MakeStateDirectory makes the directory of [StateDirectory], for this user alone.
func MakeStateDirectory() (string, error) {
	dir := StateDirectory()
	if dir == "" {
		return "", errors.New("there is no home directory")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return dir, checkOwner(dir)
}

// WriteRecord puts a record into a directory, and removes the oldest of those that are too
// many, or too old.
func WriteRecord(dir string, r vmm.MigrationRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	name := r.Started.UTC().Format(recordTime) + "-" + r.ID
	tmp := filepath.Join(dir, "."+name)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, filepath.Join(dir, name+recordSuffix))
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	names, err := recordNames(dir)
	oldest := time.Now().Add(-keptFor).UTC().Format(recordTime)
	for i, name := range names {
		if i < len(names)-maxKept || name < oldest {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
	}
	return err
}

// recordNames lists the records of a directory, the oldest first.
func recordNames(dir string) ([]string, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, f := range files {
		if name := f.Name(); strings.HasSuffix(name, recordSuffix) && !strings.HasPrefix(name, ".") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// ReadRecords reads the records of a directory, the newest first. One that cannot be read is
// an error, beside the others.
func ReadRecords(dir string) ([]vmm.MigrationRecord, error) {
	names, err := recordNames(dir)
	if err != nil {
		return nil, err
	}
	var all []vmm.MigrationRecord
	var bad []error
	for _, name := range names {
		r, err := readRecord(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // just removed
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("record of a migration: %w; remove it", err))
			continue
		}
		all = append(all, r)
	}
	return SortRecords(all), errors.Join(bad...)
}

func readRecord(path string) (r vmm.MigrationRecord, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return r, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecordFile+1))
	if err == nil && len(data) > maxRecordFile {
		err = fmt.Errorf("must be at most %d bytes", maxRecordFile)
	}
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// SortRecords puts the newest first.
func SortRecords(all []vmm.MigrationRecord) []vmm.MigrationRecord {
	slices.SortStableFunc(all, func(a, b vmm.MigrationRecord) int { return b.Started.Compare(a.Started) })
	return all
}
