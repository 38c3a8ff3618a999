// Pulls a zstd:chunked layer as podman does, file by file, with the library that podman does it with.
//
//	zstdchunked LAYER DIGEST ANNOTATIONS_JSON FOLDER
//
// Prints the digest of what the layer unpacks to, then one line for each file: owner, name and digest. FOLDER is empty.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/chunked"
	"go.podman.io/storage/pkg/reexec"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type fetcher struct{ file *os.File }

func (f fetcher) GetBlobAt(chunks []chunked.ImageSourceChunk) (chan io.ReadCloser, chan error, error) {
	streams, errs := make(chan io.ReadCloser), make(chan error)
	go func() {
		defer close(errs)
		defer close(streams)
		for _, chunk := range chunks {
			streams <- io.NopCloser(io.NewSectionReader(f.file, int64(chunk.Offset), int64(chunk.Length)))
		}
	}()
	return streams, errs, nil
}

func main() {
	if reexec.Init() {
		return
	}
	file, err := os.Open(os.Args[1])
	must(err)
	stat, err := file.Stat()
	must(err)
	annotations := map[string]string{}
	must(json.Unmarshal([]byte(os.Args[3]), &annotations))
	store, err := storage.GetStore(storage.StoreOptions{
		RunRoot:         filepath.Join(os.Args[4], "run"),
		GraphRoot:       filepath.Join(os.Args[4], "root"),
		GraphDriverName: "overlay",
		PullOptions:     map[string]string{"enable_partial_images": "true"},
	})
	must(err)
	differ, err := chunked.NewDiffer(context.Background(), store, digest.Digest(os.Args[2]), stat.Size(), annotations, fetcher{file})
	must(err)
	defer differ.Close()
	options := &graphdriver.ApplyDiffWithDifferOpts{}
	out, err := store.PrepareStagedLayer(options, differ)
	must(err)
	layer, err := store.ApplyStagedLayer(storage.ApplyStagedLayerOptions{DiffOutput: out, DiffOptions: options})
	must(err)
	root, err := store.Mount(layer.ID, "")
	must(err)
	fmt.Println(out.UncompressedDigest)
	must(filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		fmt.Printf("%d %s %x\n", info.Sys().(*syscall.Stat_t).Uid, name, sha256.Sum256(content))
		return nil
	}))
	_, err = store.Unmount(layer.ID, true)
	must(err)
	_, err = store.Shutdown(true)
	must(err)
}
